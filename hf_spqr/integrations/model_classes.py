"""Which class of Transformers a checkpoint is loaded with, and what lies beside its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

__all__ = ["auto_class", "class_of", "copy_processor"]

TASKS = {
    "AutoModelForCausalLM": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "text-generation"),
    "AutoModelForImageTextToText": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "image-text-to-text"),
    "AutoModelForSeq2SeqLM": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", None),
    "AutoModelForMaskedLM": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "fill-mask"),
    "AutoModelForSequenceClassification": (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "text-classification"
    ),
    "AutoModelForTokenClassification": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "token-classification"),
    "AutoModelForQuestionAnswering": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "question-answering"),
    "AutoModel": ("MODEL_MAPPING_NAMES", "feature-extraction"),
}  # fmt: skip
"""Auto classes with Transformers' table of the classes that each gives, and the Hub's name of the task."""
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files of processors for images, sound and video; text is the tokenizer's, which saves itself."""


def class_of(config: Any) -> Any:
    """The class that ``config`` names as that of the checkpoint, ``AutoModelForCausalLM`` where it names none.

    With another class Transformers would fill at random what the checkpoint does not have, and drop what it has.
    """
    name = (getattr(config, "architectures", None) or [""])[0]
    return getattr(transformers, name, None) or transformers.AutoModelForCausalLM


def auto_class(architecture: str | None) -> tuple[str, str | None]:
    """The Auto class that gives models of class ``architecture``, and the Hub's name of the task (None: no name).

    Unknown ones, as those with code of their own, are taken for causal language models.
    """
    for auto, (table, task) in TASKS.items():
        for names in getattr(modeling_auto, table).values():
            if architecture in ((names,) if isinstance(names, str) else names):
                return auto, task
    return "AutoModelForCausalLM", "text-generation"


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
