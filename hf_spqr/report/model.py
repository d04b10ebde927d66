"""The model that config.json describes, without weights, and what its quantization_config says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from hf_spqr.config import PackedConfig
from hf_spqr.errors import CheckpointError, ConfigError
from hf_spqr.report.model_classes import without_weights

__all__ = ["BAD_CONFIG", "empty_model", "packed_config"]

BAD_CONFIG = (ValueError, TypeError, AttributeError, StrictDataclassError)
"""What Transformers raises for a config.json that it cannot read."""


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


def empty_model(folder: Path, trust_remote_code: bool = False) -> transformers.PreTrainedModel:
    """The model that config.json in ``folder`` describes, not quantized and without memory for weights.

    Raises CheckpointError where it describes none.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return without_weights(config, trust_remote_code=trust_remote_code)
    except BAD_CONFIG as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{folder} has code of its own, without which its layers are not known: read it, then allow it to run"
                " (--trust-remote-code, in Python trust_remote_code=True)"
            ) from error
        raise CheckpointError(f"{folder / 'config.json'} describes no model that can be built: {error}") from error
