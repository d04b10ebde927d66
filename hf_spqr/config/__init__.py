"""The quantization configs that Transformers stores in ``config.json``."""

from hf_spqr.config.base import FORMAT_VERSION, PackedConfig, name_matches
from hf_spqr.config.omniquant import OmniQuantConfig
from hf_spqr.config.spqr import SpQRConfig

__all__ = ["FORMAT_VERSION", "OmniQuantConfig", "PackedConfig", "SpQRConfig", "name_matches"]
