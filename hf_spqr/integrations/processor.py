"""What lies beside the weights and the tokenizer of a model that reads more than text."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.utils import cached_file

__all__ = ["PROCESSOR", "copy_processor"]

PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files of processors for images, sound and video; text is the tokenizer's, which saves itself."""


def copy_processor(model: str, folder: Path) -> list[str]:
    """Copy the processor's files beside ``model``, a folder or a name on the Hub, to ``folder``; their names."""
    copied: list[str] = []
    for name in PROCESSOR:
        try:
            path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        except OSError:  # the model is there no more, or its name is none
            return copied
        if path is not None:
            shutil.copyfile(path, folder / name)
            copied.append(name)
    return copied
