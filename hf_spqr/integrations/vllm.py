"""vLLM: serves packed models. vLLM calls :func:`register` in each of its processes (``vllm.general_plugins``).

The layers of vLLM stay its own; a :class:`PackedLinearMethod` gives each of them packed modules to compute with, see
:mod:`hf_spqr.integrations.shards` for layers that are fused or split and :mod:`hf_spqr.integrations.vllm_experts` for
mixtures of experts.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from hf_spqr.config import OmniQuantConfig, PackedConfig, SpQRConfig
from hf_spqr.errors import ConfigError, UnsupportedLayerError
from hf_spqr.formats.tokens import fake_quantize_activation
from hf_spqr.integrations.shards import Part, Shards
from hf_spqr.integrations.vllm_experts import PackedExpertsMethod, projection_names
from hf_spqr.nn import AffineGroupedLinear, AffineLinear, GroupedLinear, PackedLinear, SpQRGroupedLinear, SpQRLinear

__all__ = ["OmniQuantVllmConfig", "PackedLinearMethod", "SpQRVllmConfig", "register"]

KNOWN_LOADERS = {
    kind.weight_loader
    for kind in (
        ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear,
    )
}  # fmt: skip
"""How the layers cut weights that :func:`_parts` knows; a subclass with a way of its own is refused."""


class PackedVllmConfig(QuantizationConfig):
    """What ``config.json`` says of a packed model. A subclass names the config of a method and its modules."""

    config_class: ClassVar[type[PackedConfig]]
    module_class: ClassVar[type[PackedLinear]]
    grouped_class: ClassVar[type[GroupedLinear]]

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        if config is None:  # what vLLM does with --quantization where the model's config.json has none
            raise ConfigError(
                f"This model is not quantized: its config.json has no quantization_config, and {self.get_name()!r}"
                " does not quantize while loading. Run `hf-spqr quantize` and serve its output without --quantization."
            )
        self.config = config

    @classmethod
    def get_name(cls) -> Any:
        return cls.config_class.quant_method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # docs/cuda.md

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedVllmConfig:
        """Raises CheckpointError for an unknown format version, ConfigError for fields out of range."""
        return cls(cls.config_class(**config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Let patterns that are full names select the same modules where vLLM calls them differently."""
        config = self.config
        if config.modules_to_not_convert:
            names = hf_to_vllm_mapper.apply_list(config.modules_to_not_convert)
            config.modules_to_not_convert = list(dict.fromkeys([*config.modules_to_not_convert, *names]))
        config.overrides = {**config.overrides, **hf_to_vllm_mapper.apply_dict(config.overrides)}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How ``layer`` computes; None leaves embeddings, the head and attention to vLLM.

        Raises UnsupportedLayerError for experts that do something that packed ones cannot.
        """
        if isinstance(layer, RoutedExperts):
            if any(self.config.excludes(name) for name in projection_names(prefix).values()):
                return None  # quantizing leaves all of such a layer alone
            return PackedExpertsMethod(self.config, self.grouped_class, prefix, layer.moe_config)
        if not isinstance(layer, LinearBase):
            return None
        names = self.shard_names(prefix)
        if all(self.config.excludes(name) for name in names):
            return UnquantizedLinearMethod()
        return PackedLinearMethod(self, prefix, names)

    def shard_names(self, prefix: str) -> list[str]:
        """The names in the file of the matrices that vLLM fuses to the layer called ``prefix``."""
        parent, dot, last = prefix.rpartition(".")
        return [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(last, [last])]

    @property
    def act_bits(self) -> int | None:
        """Bits to which each token is quantized before it is multiplied; None leaves it alone."""
        return getattr(self.config, "act_bits", None)

    @property
    def act_sym(self) -> bool:
        """Whether the grid of a token is symmetric around 0."""
        return getattr(self.config, "act_sym", False)


@register_quantization_config(SpQRConfig.quant_method)
class SpQRVllmConfig(PackedVllmConfig):
    """``quant_method: "hf_spqr"``."""

    config_class = SpQRConfig
    module_class = SpQRLinear
    grouped_class = SpQRGroupedLinear


@register_quantization_config(OmniQuantConfig.quant_method)
class OmniQuantVllmConfig(PackedVllmConfig):
    """``quant_method: "omniquant"``."""

    config_class = OmniQuantConfig
    module_class = AffineLinear
    grouped_class = AffineGroupedLinear

    def __init__(self, config: OmniQuantConfig | None = None) -> None:
        super().__init__(config)
        assert config is not None
        if config.act_bits is not None and config.params().quantize_attention:
            warnings.warn(
                f"Inputs of linear layers are quantized to {config.act_bits} bits; q, k and v inside attention, which"
                " the model was also calibrated for, stay in full precision in vLLM.",
                stacklevel=2,
            )


class PackedLinearMethod(LinearMethodBase):
    """Computes a linear layer of vLLM with packed modules.

    Args:
        quant_config: whose layer it is.
        prefix: the layer's name in vLLM.
        names: of the matrices in the file that vLLM fuses in it.
    """

    def __init__(self, quant_config: PackedVllmConfig, prefix: str, names: list[str]) -> None:
        self.quant_config, self.prefix, self.names = quant_config, prefix, names

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters, one for each tensor that a file may hold; what is loaded into them goes to ``shards``."""
        columns = (0, input_size)
        if isinstance(layer, RowParallelLinear):
            start = layer.tp_rank * input_size_per_partition
            columns = (start, start + input_size_per_partition)
        parts = _parts(layer, self.prefix, self.names, output_partition_sizes)
        config, kind = self.quant_config.config, self.quant_config.module_class
        device = torch.empty(0).device  # vLLM builds models with their device as the default one
        layer.packed_shards = Shards(config, kind, self.prefix, parts, input_size, columns, params_dtype, device)
        for name in layer.packed_shards.tensor_names:
            dtype = params_dtype if name == "weight" else torch.int32
            empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(empty, {"weight_loader": partial(_load, layer.packed_shards, name)})
            layer.register_parameter(name, empty)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make modules of what was loaded, as few as the matrices allow. Raises CheckpointError if something lacks."""
        shards: Shards | None = layer.__dict__.pop("packed_shards", None)
        if shards is None:
            return
        for name in shards.tensor_names:
            delattr(layer, name)
        if isinstance(layer, ColumnParallelLinear) and layer.tp_size > 1 and not shards.has_sentinels():
            raise _splits_its_own_way(layer, self.prefix)  # Mamba 2, whose mixer changes the loader of the weight
        if shards.all_dense():
            (linear,) = shards.modules(None)
            layer.weight = linear.weight
            layer.quant_method = UnquantizedLinearMethod()
            layer.quant_method.process_weights_after_loading(layer)
            return
        split = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
        inputs, act_bits = shards.inputs(), self.quant_config.act_bits
        if split and act_bits is not None and inputs is None:
            inputs = torch.arange(*shards.columns, device=shards.device)
        layer.register_buffer("packed_inputs", inputs, persistent=False)
        later = layer.skip_bias_add or (split and layer.tp_rank > 0)
        modules = shards.modules(None if later else layer.bias)
        for module in modules:
            if isinstance(module, AffineLinear) and inputs is None:
                module.act_bits, module.act_sym = act_bits, self.quant_config.act_sym
        layer.packed_modules = nn.ModuleList(modules)
        layer.weight = nn.Parameter(torch.empty(0, dtype=shards.dtype, device=shards.device), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features] of this rank. The bias is in the modules where vLLM adds it.

        ``packed_inputs``: the inputs of this rank among those of all ranks, where it must see all of them: to quantize
        a token on the grid of all its values, or because its columns belong to inputs of other ranks.
        """
        dtype, act_bits = x.dtype, self.quant_config.act_bits
        if layer.packed_inputs is not None:
            x = tensor_model_parallel_all_gather(x)
            if act_bits is not None:
                x = fake_quantize_activation(x.float(), act_bits, self.quant_config.act_sym)
            x = x.index_select(-1, layer.packed_inputs)
        outputs = [module(x) for module in layer.packed_modules]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)).to(dtype)


def _load(shards: Shards, name: str, parameter: Tensor, loaded: Tensor, shard_id: Any = None) -> None:
    """vLLM's weight loader of the tensor called ``name``; ``shard_id`` says of which matrix of a fused layer."""
    if shard_id is None:
        first, last = 0, len(shards.parts)
    elif isinstance(shard_id, tuple):
        first, last = shard_id[0], shard_id[-1] + 1
    else:
        first = {"q": 0, "k": 1, "v": 2}.get(shard_id, shard_id)
        first = first if isinstance(first, int) else -1
        last = first + 1
    if not 0 <= first < last <= len(shards.parts):
        raise UnsupportedLayerError(f"{shards.name} has no shard {shard_id!r} that this package knows.")
    shards.add(name, loaded, first, last)


def _parts(layer: Any, prefix: str, names: list[str], sizes: list[int]) -> list[Part]:
    """The matrices of ``layer`` and the rows of each that this rank computes; ``sizes`` are their numbers."""
    if len(names) != len(sizes):  # vLLM did not say how they are called
        names = [prefix] * len(sizes)
    if isinstance(layer, RowParallelLinear) or not isinstance(layer, ColumnParallelLinear) or layer.tp_size == 1:
        ranks, world = [0] * len(sizes), [1] * len(sizes)
    else:
        ranks, world = [layer.tp_rank] * len(sizes), [layer.tp_size] * len(sizes)
        if type(layer).weight_loader not in KNOWN_LOADERS:
            raise _splits_its_own_way(layer, prefix)
    if isinstance(layer, QKVParallelLinear) and layer.tp_size > 1:
        copies = layer.num_kv_head_replicas  # where there are more ranks than heads of k and v
        ranks[1:] = [layer.tp_rank // copies] * 2
        world[1:] = [layer.tp_size // copies] * 2
    return [
        Part(name, size * total, size * rank, size * (rank + 1))
        for name, size, rank, total in zip(names, sizes, ranks, world, strict=True)
    ]


def _splits_its_own_way(layer: Any, prefix: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"{prefix}: {type(layer).__name__} splits its weights in a way of its own; use tensor_parallel_size=1."
    )


def register() -> None:
    """Entry point of ``vllm.general_plugins``. Importing this module has registered both methods."""
