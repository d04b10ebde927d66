"""Transformers' quantizer API: quantize inside ``from_pretrained``, build packed models, save, dequantize."""

from __future__ import annotations

import copy
import re
from typing import Any, ClassVar

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from hf_spqr import quantize
from hf_spqr.calibration.blocks import stored_parts
from hf_spqr.config import FORMAT_VERSION, OmniQuantConfig, PackedConfig, SpQRConfig
from hf_spqr.errors import CheckpointError, ConfigError, UnsupportedLayerError
from hf_spqr.integrations import activations, tensor_parallel
from hf_spqr.integrations.checkpoint import Contents, check_complete, check_loaded, check_order, read_contents
from hf_spqr.integrations.experts import (
    JoinExperts,
    default_conversions,
    experts_converters,
    packed_experts,
    restore_converters,
    split_experts,
)
from hf_spqr.nn import (
    FLOATS,
    AffineGroupedLinear,
    AffineLinear,
    GroupedLinear,
    PackedExperts,
    PackedLinear,
    SpQRGroupedLinear,
    SpQRLinear,
    dense,
)
from hf_spqr.nn.experts import describe, pack_experts
from hf_spqr.report import QuantizationReport

__all__ = ["OmniQuantQuantizer", "PackedQuantizer", "SpQRQuantizer", "attach", "quantize_model", "register"]


class PackedQuantizer(HfQuantizer):
    """What every packed method shares. A subclass names its module and its config.

    Loading builds packed modules on the meta device with the shapes that the file headers give, so that device maps,
    offload and memory mapping work as for any model. Without ``pre_quantized`` the model is loaded on the CPU as it
    is, quantized in place, and then sent to the devices that were asked for.
    """

    module_class: ClassVar[type[PackedLinear]]
    grouped_class: ClassVar[type[GroupedLinear]]
    config_class: ClassVar[type[PackedConfig]]
    requires_calibration = False  # True would forbid to quantize inside from_pretrained
    quantization_config: Any

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.requested_device_map: Any = None
        self.loading: nn.Module | None = None
        self.dtypes: dict[str, torch.dtype] = {}

    # -- before loading --------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if self.pre_quantized:
            return
        if self.quantization_config.dataset is None:
            raise ConfigError(
                f"To quantize, {type(self.quantization_config).__name__} needs calibration data: pass dataset= (a list"
                " of strings, the path of a json, jsonl or txt file, a datasets object, or a data set on the Hub)."
            )
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise ConfigError(
                "Cannot quantize a model that is offloaded to disk. Quantize without 'disk' in device_map (weights are"
                " mapped from the file, one block is in memory at a time), save, and load the result with offload."
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in FLOATS:
            raise ConfigError(f"dtype={dtype}: quantized models compute in float32, bfloat16 or float16.")
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        if self.pre_quantized:
            return device_map
        self.requested_device_map = device_map
        return {"": "cpu"}

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise CheckpointError(
                "A packed model is loaded from .safetensors files, not from state_dict=: use from_pretrained(folder)."
            )
        contents = read_contents(model, checkpoint_files)
        check_complete(model, contents, stored_parts(model), dict.fromkeys(self.module_class.tensor_names))
        for name, tensors in contents.packed.items():
            model.set_submodule(name, self._empty_module(model, name, tensors, contents))
        for name, projections in contents.experts.items():
            model.set_submodule(name, self._empty_experts(model, name, projections))
        tensor_parallel.adapt_plans(model)
        self.loading = model
        self.dtypes = _wanted_dtypes(model)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        # Transformers 5.17 does not pass the model
        conversions = super().update_weight_conversions(weight_conversions, *model)
        if self.loading is None:
            return conversions
        shares = tensor_parallel.share_converters(self.module_class.tensor_names)
        return experts_converters(self.loading) + shares + conversions

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        # asked of a tensor of another shape than expected: how many outliers a rank holds is known once they are read
        if not tensor_parallel.is_distributed() or not param_name.endswith(".outlier"):
            return False
        return isinstance(model.get_submodule(param_name.rpartition(".")[0]), PackedLinear | GroupedLinear)

    def _empty_module(self, model: nn.Module, name: str, tensors: dict[str, Any], contents: Contents) -> PackedLinear:
        config, linear = self.quantization_config, model.get_submodule(name)
        specs = {key: spec for key, spec in tensors.items() if key not in ("weight", "bias")}
        names = (contents.modules[name], *_names(model, name))
        layout = config.layout(*dense.features(linear), *names)
        check_order(name, config.stores_order(*names), "perm" in specs)
        try:
            bias: Any = linear.bias
            module = self.module_class.empty(layout, specs, bias, dense.matrix(linear).dtype, config.backend)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        module.replaces = dense.kind(linear)
        return module

    def _empty_experts(
        self, model: nn.Module, name: str, found: dict[str, dict[int, dict[str, Any]]]
    ) -> PackedExperts:
        config, module = self.quantization_config, model.get_submodule(name)
        kind = describe(module)
        assert kind is not None
        linears = {}
        for projection, shape in kind.projections.items():
            layout = config.layout(*shape, *_names(model, f"{name}.{projection}"))
            specs = [found[projection][expert] for expert in range(kind.experts)]
            try:
                linears[projection] = self.grouped_class.empty(layout, specs, config.backend)
            except CheckpointError as error:
                raise CheckpointError(f"{name}.{projection}: {error}") from error
        return pack_experts(module, linears)

    # -- after loading ---------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.loading = None
        if self.pre_quantized:
            _cast(model, self.dtypes)
            tensor_parallel.finish(model)
            self._check_loaded(model)
            _drop_conversions(model)
            return
        tensor_parallel.refuse_to_quantize(model)
        check_loaded(model, stored_parts(model))
        config = self.quantization_config
        quantize.quantize_model(model, config, device=_calibration_device(self.requested_device_map))
        config.forget_data()
        self.pre_quantized = True
        _drop_conversions(model)
        _place(model, self.requested_device_map, self)

    def _check_loaded(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if not isinstance(module, PackedLinear | GroupedLinear):
                continue
            for key, parameter in module.named_parameters(recurse=False):
                if key != "bias":
                    parameter.requires_grad_(False)
            try:
                with align_module_device(module):  # what is offloaded to disk is mapped for the moment
                    if not module.packed.is_meta:  # as device_map="meta" leaves it
                        module.check()
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from error

    # -- the quantized model ---------------------------------------------------------------------------------------

    def dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        # Transformers would take the dtype of loading for None, whatever the model was cast to since
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if dtype not in (None, *FLOATS):
            raise ConfigError(f"dtype={dtype}: dequantize to float32, bfloat16 or float16.")
        model = self._dequantize(model, dtype)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Ordinary layers in place of packed ones, each of its own float dtype; ``dtype`` casts all of the model."""
        tensor_parallel.refuse_to_dequantize(model)
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear | GroupedLinear) and module.packed.is_meta:
                raise UnsupportedLayerError(f"{name} is offloaded: load the model without offload to dequantize it.")
        if dtype is not None:
            model.to(dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, module.to_linear().requires_grad_())
        experts = packed_experts(model)
        for name, packed in experts.items():
            model.set_submodule(name, packed.to_experts().requires_grad_())
        if experts:
            restore_converters(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[Any, dict[str, str]]:
        state = tensor_parallel.whole_state(model) or split_experts(model)
        return state, {"hf_spqr_format_version": str(FORMAT_VERSION)}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside the packed layers, that is: the packed weights have no gradient

    @property
    def is_compileable(self) -> bool:
        return True


class SpQRQuantizer(PackedQuantizer):
    """``quant_method: "hf_spqr"``."""

    module_class = SpQRLinear
    grouped_class = SpQRGroupedLinear
    config_class = SpQRConfig


class OmniQuantQuantizer(PackedQuantizer):
    """``quant_method: "omniquant"``."""

    module_class = AffineLinear
    grouped_class = AffineGroupedLinear
    config_class = OmniQuantConfig

    def _empty_module(self, model: nn.Module, name: str, tensors: dict[str, Any], contents: Contents) -> PackedLinear:
        module = super()._empty_module(model, name, tensors, contents)
        module.act_bits = self.quantization_config.act_bits  # how a layer is divided among ranks depends on it
        return module

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        super()._process_model_after_weight_loading(model, **kwargs)
        activations.enforce(model, self.quantization_config)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        model = super()._dequantize(model, dtype)
        activations.release(model)
        return model


def quantize_model(model: nn.Module, config: SpQRConfig | OmniQuantConfig, **arguments: Any) -> QuantizationReport:
    """Quantize a loaded model in place and make the result known to Transformers, so that it can be saved.

    Takes the arguments of :func:`hf_spqr.quantize.quantize_model` and raises what it raises.
    """
    config = copy.deepcopy(config)
    report = quantize.quantize_model(model, config, **arguments)
    config.forget_data()
    attach(model, config)
    return report


def attach(model: nn.Module, config: PackedConfig) -> None:
    """Make a model whose layers are packed already known to Transformers, so that it can be saved and dequantized."""
    quantizer = QUANTIZERS[type(config)](config, pre_quantized=True)
    model.config.quantization_config = config  # type: ignore[union-attr]
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method
    _drop_conversions(model)
    if isinstance(config, OmniQuantConfig):
        activations.enforce(model, config)


QUANTIZERS: dict[type[PackedConfig], type[PackedQuantizer]] = {
    SpQRConfig: SpQRQuantizer,
    OmniQuantConfig: OmniQuantQuantizer,
}


def register() -> None:
    """Make the quantization methods known to Transformers; called by ``import hf_spqr``, harmless when repeated."""
    activations.register_attention()
    activations.install()
    for config_class, quantizer in QUANTIZERS.items():
        method = config_class.quant_method
        auto.AUTO_QUANTIZER_MAPPING[method] = quantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config_class
        if config_class not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
            auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (config_class,)  # type: ignore[assignment]


def _names(model: nn.Module, name: str) -> set[str]:
    """The names that a layer goes by: overrides may be written for a model with a head or for one without it."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return {name, prefix + name, name.removeprefix(prefix)}


def _wanted_dtypes(model: Any) -> dict[str, torch.dtype]:
    """The dtypes that the float parameters of ``model``, still on meta, should have when they are loaded."""
    parameters = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
    plan = model._get_dtype_plan(model.dtype)  # modules that stay in float32
    for pattern, dtype in plan.items():
        parameters |= dict.fromkeys(filter(re.compile(pattern.replace("*", ".*")).search, parameters), dtype)
    return parameters


def _cast(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give parameters their dtypes. Transformers 5.17 leaves those whose names it changes in the dtype of the file."""
    for name, parameter in model.named_parameters():
        dtype = dtypes.get(name, parameter.dtype)
        if parameter.dtype != dtype and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)


def _calibration_device(device_map: Any) -> torch.device | None:
    """The first accelerator that ``device_map`` names; None for the CPU."""
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda", 0) if torch.cuda.is_available() else None
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    for device in devices:
        if device is not None and torch.device(device).type not in ("cpu", "meta"):
            return torch.device(device)
    return None


def _drop_conversions(model: nn.Module) -> None:
    """Forget the weight converters that would take a packed layer apart when the model is saved.

    Transformers reverses on save what it merged on load. A converter whose result was quantized cannot be reversed;
    the layer is stored under its name in the model instead, where loading finds it without a converter.
    """
    from transformers.core_model_loading import WeightConverter

    conversions: Any = getattr(model, "_weight_conversions", None)
    packed = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    for name, experts in packed_experts(model).items():
        packed += [f"{name}.{experts.kind.fused}", f"{name}.down_proj"]
    if conversions is None:  # not from from_pretrained: saving would take the default ones
        conversions = default_conversions(model)

    def touches(converter: WeightConverter) -> bool:
        if isinstance(converter.operations[0], JoinExperts | tensor_parallel.TakeShare):
            return True
        back = converter.reverse_transform()
        return any(back.rename_source_key(name)[1] is not None for name in packed)

    model._weight_conversions = [  # type: ignore[assignment]
        entry for entry in conversions if not (isinstance(entry, WeightConverter) and touches(entry))
    ]


def _place(model: Any, device_map: Any, quantizer: HfQuantizer) -> None:
    """Send a quantized model from the CPU to the devices that ``from_pretrained`` was asked for."""
    if device_map is None:
        return
    from transformers.integrations.accelerate import _get_device_map, accelerate_dispatch

    device_map = _get_device_map(model, device_map, None, quantizer)
    devices = set(device_map.values())
    if len(devices) == 1:  # as after a load: no hooks, and no note that Transformers would take for offload
        model.to(devices.pop())
    else:
        accelerate_dispatch(model, quantizer, device_map, None, None, False)
