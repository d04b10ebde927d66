"""SpQR and OmniQuant for Hugging Face Transformers.

Importing this package registers its quantization methods::

    import hf_spqr
    from transformers import AutoModelForCausalLM

    config = hf_spqr.SpQRConfig(bits=3, dataset=texts)
    model = AutoModelForCausalLM.from_pretrained("base/model", quantization_config=config)  # quantizes
    model.save_pretrained("model-SpQR")
"""

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
from hf_spqr.integrations import hub, legacy
from hf_spqr.integrations.transformers import quantize_model, register
from hf_spqr.integrations.when_imported import when_imported

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


def _teach_peft() -> None:
    from hf_spqr.integrations import peft

    peft.install()


register()
legacy.register()
hub.install()
when_imported("peft.tuners.lora.model", _teach_peft)
