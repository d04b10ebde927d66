"""Which class of Transformers a checkpoint is loaded with."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from hf_spqr.errors import UnsupportedLayerError

__all__ = ["auto_class", "class_of", "without_weights"]

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


def class_of(config: Any) -> Any:
    """The class that ``config`` names as that of the checkpoint, ``AutoModelForCausalLM`` where it names none.

    With another class Transformers would fill at random what the checkpoint does not have, and drop what it has.

    Raises UnsupportedLayerError where Transformers has neither.
    """
    name = (getattr(config, "architectures", None) or ["of that name"])[0]
    found, causal = getattr(transformers, name, None), transformers.AutoModelForCausalLM
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if type(config) not in causal._model_mapping:  # what from_pretrained looks in
        raise UnsupportedLayerError(
            f"this Transformers has no class {name}, and no language model of type {config.model_type}: update it, or"
            " correct architectures in config.json"
        )
    return causal


def without_weights(config: Any, dtype: torch.dtype | None = None) -> transformers.PreTrainedModel:
    """The model that ``config`` describes, on the meta device."""
    found = class_of(config)
    with torch.device("meta"):
        return (found._from_config if hasattr(found, "_from_config") else found.from_config)(config, dtype=dtype)


def auto_class(architecture: str | None) -> tuple[str, str | None]:
    """The Auto class that gives models of class ``architecture``, and the Hub's name of the task (None: no name).

    Unknown ones, as those with code of their own, are taken for causal language models.
    """
    for auto, (table, task) in TASKS.items():
        for names in getattr(modeling_auto, table).values():
            if architecture in ((names,) if isinstance(names, str) else names):
                return auto, task
    return "AutoModelForCausalLM", "text-generation"
