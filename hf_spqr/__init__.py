"""SpQR and OmniQuant for Hugging Face Transformers.

Importing this package registers its quantization methods::

    import hf_spqr
    from transformers import AutoModelForCausalLM

    config = hf_spqr.SpQRConfig(bits=3, dataset=texts)
    model = AutoModelForCausalLM.from_pretrained("base/model", quantization_config=config)  # quantizes
    model.save_pretrained("model-SpQR")

The import itself is quick, it loads neither torch nor Transformers. The ops are there as soon as torch is, the methods
as soon as Transformers looks for one, and each public name below when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import hf_spqr_autoload
from hf_spqr.when_imported import when_imported

if TYPE_CHECKING:
    from hf_spqr.config import OmniQuantConfig, SpQRConfig
    from hf_spqr.errors import (
        CalibrationError,
        CheckpointError,
        ConfigError,
        HfSpqrError,
        NonFiniteError,
        RankError,
        UnsupportedLayerError,
    )
    from hf_spqr.integrations.transformers import quantize_model

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "HfSpqrError",
    "NonFiniteError",
    "OmniQuantConfig",
    "RankError",
    "SpQRConfig",
    "UnsupportedLayerError",
    "quantize_model",
]

_HOMES = {
    "OmniQuantConfig": "hf_spqr.config",
    "SpQRConfig": "hf_spqr.config",
    "quantize_model": "hf_spqr.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES.get(name, "hf_spqr.errors")), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


when_imported("torch", lambda: import_module("hf_spqr.ops"))
if hf_spqr_autoload.find_tables():  # Transformers is there: no need to wait for its question
    import_module("hf_spqr.integrations")
else:
    hf_spqr_autoload.init()
