"""Official SpQR checkpoints (``quant_method: "spqr"``) through plain ``from_pretrained``, on any device and dtype.

The matrices are read into our format, exactly: the model that comes out is the same as one that hf_spqr wrote, with
its config, and is saved in our format. Takes the place of Transformers' own loader for that key, which needs a GPU
and float16 and fails on nested models.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_spqr import config as configs
from hf_spqr.calibration.blocks import find_blocks
from hf_spqr.errors import CheckpointError, ConfigError, UnsupportedLayerError
from hf_spqr.formats import official_spqr
from hf_spqr.formats.official_spqr import TENSORS
from hf_spqr.formats.spqr import SpQRWeight
from hf_spqr.integrations.checkpoint import Renamer, Spec, read_headers
from hf_spqr.integrations.transformers import SpQRQuantizer, attach
from hf_spqr.nn import SpQRLinear
from hf_spqr.report import LayerReport, QuantizationReport

__all__ = ["METHOD", "VALUES", "OfficialSpQRQuantizer", "SpQRConfig", "register"]

METHOD = "spqr"
VALUES = "outlier_values"
"""Field that we add to the official config: "residual" says that outlier values are what the format says they are."""

RAW_SHARE = 0.8
"""Of the outliers, above codes that stand for zero: nearly all where whole weights were stored, one in five else."""

NEEDED = ("dense_weights", "row_offsets", "col_vals")


class SpQRConfig(configs.SpQRConfig):
    """The official config, as far as it says something: ``shapes`` and the list of parameters are in the file too.

    Named as Transformers' class of that key, so that its objects are taken as loading options too.
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

    def ours(self) -> configs.SpQRConfig:
        """The config of the model once it is in our format."""
        return configs.SpQRConfig(bits=3, group_size=16, scale_bits=3, zero_bits=3, backend=self.backend)


class OfficialSpQRQuantizer(SpQRQuantizer):
    """``quant_method: "spqr"``: loads only, and leaves a model of ``quant_method: "hf_spqr"``."""

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

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("Official SpQR checkpoints are loaded from .safetensors files: give their folder.")
        rename = Renamer(model)
        starts = tuple(f"{block.name}." for block in find_blocks(model))
        dense: set[str] = set()
        stored: dict[str, dict[str, Spec]] = {}
        for name, spec in read_headers(checkpoint_files).items():
            module, _, leaf = name.rpartition(".")
            if leaf in TENSORS:
                target = rename(f"{module}.weight")[0].rpartition(".")[0]
                stored.setdefault(target, {})[leaf] = spec
            else:
                dense.update(rename(name))
        if not stored:
            raise CheckpointError(
                "The config says that this is an official SpQR checkpoint, but it has no such layer."
            )
        for name, specs in stored.items():
            model.set_submodule(name, _placeholder(model, name, specs))
        for name, _ in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            if name.startswith(starts) and name not in dense and not (module in stored and leaf in TENSORS):
                raise CheckpointError(f"The checkpoint lacks {name}: it is incomplete or damaged.")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, StoredLinear)}
        weights = {name: module.decode(name) for name, module in layers.items()}
        config: SpQRConfig = self.quantization_config
        notes = ["Read from an official SpQR checkpoint; how it was calibrated is not known."]
        if config.outlier_values != "residual" and (repaired := _repair(weights)):
            notes.append(repaired)
            warnings.warn(repaired, stacklevel=2)
        report = QuantizationReport(method="hf_spqr", config=config.ours().to_dict(), notes=notes)
        for name, stored in layers.items():
            module = SpQRLinear.from_weight(weights.pop(name), stored.bias, stored.dtype).to(stored.device)
            module.backend = config.backend
            if hasattr(stored, "_hf_hook"):
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(module, stored._hf_hook)
            model.set_submodule(name, module)
            report.layers.append(_layer_report(name, module))
        self.quantization_config = config.ours()
        attach(model, self.quantization_config)
        model.quantization_report = report  # type: ignore[assignment]


class StoredLinear(nn.Module):
    """Holds the official tensors of a layer while a checkpoint is loaded."""

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, specs: dict[str, Spec]) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        for leaf, (shape, dtype) in specs.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", linear.bias)

    @property
    def device(self) -> torch.device:
        return self.get_parameter("dense_weights").device

    def decode(self, name: str) -> SpQRWeight:
        """The matrix, on the CPU. Raises CheckpointError naming the layer if the tensors are damaged."""
        tensors: dict[str, Tensor] = {leaf: p.detach() for leaf, p in self.named_parameters() if leaf in TENSORS}
        if any(tensor.is_meta for tensor in tensors.values()):
            raise UnsupportedLayerError(
                f"{name} is offloaded: an official SpQR checkpoint is rewritten while it is loaded and cannot be."
                " Rewrite it once with `hf-spqr convert`, then load the result with offload."
            )
        try:
            on_host = {leaf: tensor.cpu() for leaf, tensor in tensors.items()}
            return official_spqr.decode(self.out_features, self.in_features, on_host)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error


def _placeholder(model: nn.Module, name: str, specs: dict[str, Spec]) -> StoredLinear:
    try:
        linear: nn.Module | None = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(f"The checkpoint has SpQR tensors for {name}, which is no linear layer of the model.")
    for leaf in NEEDED:
        if leaf not in specs:
            raise CheckpointError(f"The checkpoint lacks {name}.{leaf}: it is incomplete or damaged.")
    return StoredLinear(linear, specs)


def _repair(weights: dict[str, SpQRWeight]) -> str | None:
    """Turn raw outliers into residuals, in place; what was done in words, None if there was nothing to repair."""
    hits = total = 0
    for weight in weights.values():
        found = official_spqr.raw_outliers(weight)
        hits, total = hits + found[0], total + found[1]
    if hits <= RAW_SHARE * total:
        return None
    for name, weight in weights.items():
        weights[name] = official_spqr.repair(weight)
    return (
        f"The outliers of this official SpQR checkpoint were detected as raw weights ({hits} of {total} stand above a"
        " code of zero) where its format wants what is to be added to the dense weight, a known fault of the published"
        " converter. They were repaired: the weights are now those that its quantizer meant."
    )


def _layer_report(name: str, module: SpQRLinear) -> LayerReport:
    return LayerReport(
        name=name,
        shape=(module.out_features, module.in_features),
        method="spqr",
        bits=module.layout.bits,
        group_size=module.layout.group_size,
        nbytes=module.nbytes(),
        outliers=module.outliers(),
    )


def register() -> None:
    """Load official checkpoints with this module instead of Transformers' own loader for the key."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = OfficialSpQRQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SpQRConfig
