"""Official SpQR checkpoints (``quant_method: "spqr"``) through plain ``from_pretrained``, on any device and dtype.

The matrices are read into our format, exactly: the model that comes out is the same as one that hf_spqr wrote, with
its config, and is saved in our format. Takes the place of Transformers' own loader for that key, which needs a GPU
and float16 and fails on nested models.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_spqr import config as configs
from hf_spqr.errors import CheckpointError, ConfigError
from hf_spqr.formats import official_spqr
from hf_spqr.formats.spqr import SpQRWeight
from hf_spqr.integrations.stored import ImportingQuantizer, StoredLinear
from hf_spqr.integrations.transformers import SpQRQuantizer

__all__ = ["METHOD", "OfficialSpQRQuantizer", "SpQRConfig", "register"]

METHOD = "spqr"
RAW_SHARE = 0.8
"""Of the outliers, above codes that stand for zero: nearly all where whole weights were stored, one in five else."""


class SpQRConfig(configs.SpQRConfig):
    """The official config, as far as it says something: ``shapes`` and the list of parameters are in the file too.

    Named as Transformers' class of that key, so that its objects are taken as loading options too. ``outlier_values``
    is a field that we add when we write: "residual" says that outlier values are what the format says they are.
    """

    quant_method = METHOD

    def __init__(
        self,
        bits: int = 3,
        beta1: int = 16,
        beta2: int = 16,
        outlier_values: str | None = None,
        backend: str = "auto",
        **ignored: Any,
    ) -> None:
        if (bits, beta1, beta2) != (3, 16, 16):
            raise CheckpointError(
                f"Official SpQR checkpoints have bits=3, beta1=16, beta2=16; this one says bits={bits}, beta1={beta1},"
                f" beta2={beta2}, which its tensors cannot hold. Quantize the base model again with hf_spqr."
            )
        super().__init__(bits=3, group_size=16, scale_bits=3, zero_bits=3, second_group=16, backend=backend)
        self.outlier_values = outlier_values


class OfficialSpQRQuantizer(ImportingQuantizer, SpQRQuantizer):
    """``quant_method: "spqr"``: loads only, and leaves a model of ``quant_method: "hf_spqr"``."""

    needed = ("dense_weights", "row_offsets", "col_vals")
    optional = ("in_perm",)
    title = "the official SpQR checkpoints"

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        if not isinstance(quantization_config, SpQRConfig):
            quantization_config = SpQRConfig(**quantization_config.to_dict())
        super().__init__(quantization_config, **kwargs)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ConfigError(
                'quant_method "spqr" (transformers.SpQRConfig) is for loading official SpQR checkpoints. To quantize a'
                " model, pass hf_spqr.SpQRConfig(...) instead."
            )

    def read(self, linear: StoredLinear, tensors: dict[str, Tensor]) -> SpQRWeight:
        return official_spqr.decode(linear.out_features, linear.in_features, tensors)

    def finish(self, weights: dict[str, SpQRWeight]) -> list[str]:
        """Turn raw outliers into residuals, with a warning."""
        if self.quantization_config.outlier_values == "residual":
            return []
        hits = total = 0
        for weight in weights.values():
            found = official_spqr.raw_outliers(weight)
            hits, total = hits + found[0], total + found[1]
        if hits <= RAW_SHARE * total:
            return []
        for name, weight in weights.items():
            weights[name] = official_spqr.repair(weight)
        message = (
            f"The outliers of this official SpQR checkpoint were detected as raw weights ({hits} of {total} stand"
            " above a code of zero) where its format wants what is to be added to the dense weight, a known fault of"
            " the published converter. They were repaired: the weights are now those that its quantizer meant."
        )
        warnings.warn(message, stacklevel=2)
        return [message]

    def our_config(self) -> configs.SpQRConfig:
        backend = self.quantization_config.backend
        return configs.SpQRConfig(bits=3, group_size=16, scale_bits=3, zero_bits=3, backend=backend)


def register() -> None:
    """Load official checkpoints with this module instead of Transformers' own loader for the key."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = OfficialSpQRQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SpQRConfig
