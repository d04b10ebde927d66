"""Reading other people's packed checkpoints inside ``from_pretrained``: what the importers share.

The linear layers are replaced by holders of the foreign tensors while the files are read, and by our packed layers
afterwards. The model that comes out is like one that hf_spqr quantized: same modules, our config, saved in our format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_spqr.calibration.blocks import stored_parts
from hf_spqr.config import PackedConfig
from hf_spqr.errors import CheckpointError, ConfigError, UnsupportedLayerError
from hf_spqr.integrations import tensor_parallel
from hf_spqr.integrations.checkpoint import Spec, read_specs
from hf_spqr.integrations.transformers import PackedQuantizer, attach
from hf_spqr.nn import PackedLinear
from hf_spqr.report import LayerReport, QuantizationReport
from hf_spqr.report.names import Renamer

__all__ = ["ImportingQuantizer", "StoredLinear", "layer_report"]


class StoredLinear(nn.Module):
    """Holds the foreign tensors of a layer while a checkpoint is loaded."""

    bias: Tensor | None
    is_foreign = True

    def __init__(self, linear: nn.Linear, specs: Mapping[str, Spec]) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.leaves = tuple(specs)
        for leaf, (shape, dtype) in specs.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", linear.bias)

    @property
    def device(self) -> torch.device:
        return self.get_parameter(self.leaves[0]).device

    def tensors(self) -> dict[str, Tensor]:
        """The foreign tensors, where they were loaded."""
        return {leaf: self.get_parameter(leaf).detach() for leaf in self.leaves}


class ImportingQuantizer(PackedQuantizer):
    """Loads only. A subclass names the foreign tensors and says how a matrix is read."""

    needed: ClassVar[tuple[str, ...]]
    """Tensors that every packed layer of the foreign format has; the first tells packed layers from others."""
    optional: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str]
    """What the format is called in messages."""

    def read(self, linear: StoredLinear, tensors: dict[str, Tensor]) -> Any:
        """The matrix of a layer from its tensors on the CPU; ValueError if they are damaged."""
        raise NotImplementedError

    def finish(self, weights: dict[str, Any]) -> list[str]:
        """Look over all matrices, change them in place, and say in words what was done."""
        return []

    def our_config(self) -> PackedConfig:
        """The config of the model once it is in our format."""
        raise NotImplementedError

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ConfigError(
                f"This config is for loading {self.title}. To quantize a model, pass hf_spqr.SpQRConfig(...) or"
                " hf_spqr.OmniQuantConfig(...) instead."
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError(f"{self.title} are loaded from .safetensors files: give their folder.")
        rename = Renamer(model)
        starts = tuple(stored_parts(model))
        headers = read_specs(checkpoint_files)
        packed = {name.rpartition(".")[0] for name in headers if name.rpartition(".")[2] in self.needed}
        dense: set[str] = set()
        stored: dict[str, dict[str, Spec]] = {}
        for name, spec in headers.items():
            module, _, leaf = name.rpartition(".")
            if module in packed and leaf in (*self.needed, *self.optional):
                stored.setdefault(rename(f"{module}.weight")[0].rpartition(".")[0], {})[leaf] = spec
            else:
                dense.update(rename(name))
        if not stored:
            raise CheckpointError(
                f"This should be one of {self.title}, but its files have no {self.needed[0]} of any layer."
            )
        for name, specs in stored.items():
            model.set_submodule(name, self._holder(model, name, specs))
        tensor_parallel.adapt_plans(model)
        for name, _ in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            if name.startswith(starts) and name not in dense and leaf not in stored.get(module, ()):
                raise CheckpointError(f"The checkpoint lacks {name}: it is incomplete or damaged.")

    def _holder(self, model: nn.Module, name: str, specs: dict[str, Spec]) -> StoredLinear:
        try:
            linear: nn.Module | None = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(
                f"The checkpoint has packed tensors for {name}, which is no linear layer of the model."
            )
        for leaf in self.needed:
            if leaf not in specs:
                raise CheckpointError(f"The checkpoint lacks {name}.{leaf}: it is incomplete or damaged.")
        return StoredLinear(linear, specs)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, StoredLinear)}
        weights = {name: self._read_named(name, linear) for name, linear in layers.items()}
        notes = [f"Read from {self.title}; how it was calibrated is not known.", *self.finish(weights)]
        config = self.our_config()
        report = QuantizationReport(method=str(config.quant_method), config=config.to_dict(), notes=notes)
        for name, stored in layers.items():
            kind: Any = self.module_class
            module: PackedLinear = kind.from_weight(weights.pop(name), stored.bias, stored.dtype).to(stored.device)
            module.backend = config.backend
            if hasattr(stored, "_hf_hook"):
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(module, stored._hf_hook)
            model.set_submodule(name, module)
            report.layers.append(layer_report(name, module, str(config.quant_method)))
        self.quantization_config = config
        attach(model, config)
        model.quantization_report = report  # type: ignore[assignment]

    def _read_named(self, name: str, linear: StoredLinear) -> Any:
        tensors = linear.tensors()
        if any(tensor.is_meta for tensor in tensors.values()):
            raise UnsupportedLayerError(
                f"{name} is offloaded: foreign checkpoints are rewritten while they are loaded and cannot be."
                " Rewrite it once with `hf-spqr convert`, then load the result with offload."
            )
        try:
            return self.read(linear, {leaf: tensor.cpu() for leaf, tensor in tensors.items()})
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error


def layer_report(name: str, module: PackedLinear, quant_method: str) -> LayerReport:
    """What can be said of a layer that came packed: its size, not its error."""
    outliers = getattr(module, "outliers", None)
    return LayerReport(
        name=name,
        shape=(module.out_features, module.in_features),
        method={"hf_spqr": "spqr"}.get(quant_method, quant_method),
        bits=module.layout.bits,
        group_size=module.layout.group_size,
        nbytes=module.nbytes(),
        outliers=0 if outliers is None else outliers(),
    )
