"""The model that config.json describes: its class, itself without weights, what its quantization_config says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import modeling_auto
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from hf_spqr.config import PackedConfig
from hf_spqr.errors import CheckpointError, ConfigError

__all__ = ["auto_class", "class_of", "empty_model", "packed_config", "without_weights"]

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


def packed_config(folder: Path, quantization: Mapping[str, Any]) -> PackedConfig | None:
    """The object of a ``quantization_config``; None for methods of other packages.

    Raises CheckpointError, naming the file in ``folder``, where a field is out of range or the version is unknown.
    """
    config_class = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(quantization.get("quant_method")))
    if config_class is None or not issubclass(config_class, PackedConfig):
        return None
    try:
        return config_class.from_dict(dict(quantization))
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def class_of(config: Any) -> Any:
    """The class that ``config`` names as that of the checkpoint, ``AutoModelForCausalLM`` where it names none.

    With another class Transformers would fill at random what the checkpoint does not have, and drop what it has.

    Raises ConfigError where there is neither in this Transformers.
    """
    name = (getattr(config, "architectures", None) or [None])[0]
    found = getattr(transformers, name or "", None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    causal: Any = transformers.AutoModelForCausalLM
    if type(config) not in causal._model_mapping:  # what from_pretrained looks in
        named = name or f"none, model_type {config.model_type!r}"
        raise ConfigError(
            f"{config.name_or_path}: its architecture ({named}) is no language model that this Transformers knows"
        )
    return causal


def auto_class(architecture: str | None) -> tuple[str, str | None]:
    """The Auto class that gives models of class ``architecture``, and the Hub's name of the task (None: no name).

    Unknown ones, as those with code of their own, are taken for causal language models.
    """
    for auto, (table, task) in TASKS.items():
        for names in getattr(modeling_auto, table).values():
            if architecture in ((names,) if isinstance(names, str) else names):
                return auto, task
    return "AutoModelForCausalLM", "text-generation"


def without_weights(config: Any, dtype: torch.dtype | None = None) -> transformers.PreTrainedModel:
    """The model that ``config`` describes, on the meta device. Raises ConfigError as :func:`class_of`."""
    found = class_of(config)
    with torch.device("meta"):
        return (found._from_config if hasattr(found, "_from_config") else found.from_config)(config, dtype=dtype)


def empty_model(folder: Path) -> transformers.PreTrainedModel:
    """The model that config.json in ``folder`` describes, not quantized and without memory for weights.

    Raises CheckpointError where it describes none.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return without_weights(config)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / 'config.json'} describes no model that can be built: {error}") from error
