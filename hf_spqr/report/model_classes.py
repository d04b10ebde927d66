"""Which class of Transformers a checkpoint is loaded with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from hf_spqr.errors import UnsupportedLayerError

__all__ = ["auto_class", "class_of", "own_auto_class", "without_weights"]

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


def class_of(config: Any, trust_remote_code: bool = False) -> Any:
    """The class that ``config`` names as that of the checkpoint, ``AutoModelForCausalLM`` where it names none.

    With another class Transformers would fill at random what the checkpoint does not have, and drop what it has.

    trust_remote_code: take a class from the code beside the model, through its Auto class, where ``config`` has one.

    Raises UnsupportedLayerError where Transformers has neither.
    """
    name = (getattr(config, "architectures", None) or ["of that name"])[0]
    own = own_auto_class(getattr(config, "auto_map", None), name) if trust_remote_code else None
    if own is not None:
        return getattr(transformers, own)
    found, causal = getattr(transformers, name, None), transformers.AutoModelForCausalLM
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if type(config) not in causal._model_mapping:  # what from_pretrained looks in
        raise UnsupportedLayerError(
            f"this Transformers has no class {name}, and no language model of type {config.model_type}: update it, or"
            " correct architectures in config.json"
        )
    return causal


def own_auto_class(auto_map: Mapping[str, Any] | None, architecture: str | None) -> str | None:
    """The Auto class that gives ``architecture`` from the code that ``auto_map`` of a config.json names; or None."""
    classes = {auto: str(place).rpartition(".")[2] for auto, place in (auto_map or {}).items()}
    models = [auto for auto in classes if auto.startswith("AutoModel") and hasattr(transformers, auto)]
    fitting = [auto for auto in models if classes[auto] == architecture]
    causal = "AutoModelForCausalLM"
    return causal if causal in (fitting or models) else next(iter(fitting), None)


def without_weights(
    config: Any, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> transformers.PreTrainedModel:
    """The model that ``config`` describes, on the meta device."""
    found = class_of(config, trust_remote_code)
    with torch.device("meta"):
        if hasattr(found, "_from_config"):
            return found._from_config(config, dtype=dtype)
        return found.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def auto_class(architecture: str | None, auto_map: Mapping[str, Any] | None = None) -> tuple[str, str | None]:
    """The Auto class that gives models of class ``architecture``, and the Hub's name of the task (None: no name).

    auto_map: that of config.json, of a model with code of its own. Unknown ones are taken for causal language models.
    """
    own = own_auto_class(auto_map, architecture)
    if own is not None:
        return own, TASKS[own][1] if own in TASKS else None
    for auto, (table, task) in TASKS.items():
        for names in getattr(modeling_auto, table).values():
            if architecture in ((names,) if isinstance(names, str) else names):
                return auto, task
    return "AutoModelForCausalLM", "text-generation"
