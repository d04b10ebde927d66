"""The files beside the weights and the tokenizer of a model that no ``save_pretrained`` of its model writes."""

from __future__ import annotations

from pathlib import Path

from hf_spqr.integrations.processor import copy_processor
from hf_spqr.integrations.sentence_transformers import copy_modules

__all__ = ["copy_beside"]


def copy_beside(model: str, folder: Path) -> None:
    """Copy them to ``folder``: of the processor for images and sound, and of Sentence Transformers.

    ``model`` is a folder or a name on the Hub.
    """
    copy_processor(model, folder)
    copy_modules(model, folder)
