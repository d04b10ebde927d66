"""Mixtures of experts in vLLM, for :mod:`hf_spqr.integrations.vllm`.

vLLM routes tokens and adds up what the ranks give; :class:`PackedExpertsMethod` computes the experts in between, with
one :class:`~hf_spqr.nn.grouped.GroupedLinear` for each projection, as in Transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from hf_spqr.config import PackedConfig
from hf_spqr.errors import CheckpointError, ConfigError, UnsupportedLayerError
from hf_spqr.integrations.checkpoint import check_order
from hf_spqr.nn import AffineGroupedLinear, GroupedLinear
from hf_spqr.nn.experts import by_expert
from hf_spqr.nn.share import chunk

__all__ = ["PackedExpertsMethod", "projection_names"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def projection_names(prefix: str, gated: bool = True) -> dict[str, str]:
    """The projections of the experts module ``prefix``, as config patterns call them, by vLLM's id of a shard."""
    shards = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"} if gated else {"w1": "up_proj", "w2": "down_proj"}
    return {shard: f"{prefix}.{name}" for shard, name in shards.items()}


class PackedExpertsMethod(FusedMoEMethodBase):
    """Computes the experts of a layer of vLLM with packed matrices. Each rank has some of the experts, in full.

    Args:
        config: the quantization config of the file.
        grouped_class: the module of one projection of all experts.
        prefix: the layer's name in vLLM.
        moe: vLLM's description of the layer.

    Raises:
        UnsupportedLayerError: something about the layer that this method does not compute, or CUDA graphs are on.
        ConfigError: there are more ranks than experts.
    """

    def __init__(
        self, config: PackedConfig, grouped_class: type[GroupedLinear], prefix: str, moe: FusedMoEConfig
    ) -> None:
        super().__init__(moe)
        self.config, self.grouped_class, self.prefix = config, grouped_class, prefix
        self.activation = moe.activation.value.removesuffix("_no_mul")
        parallel = moe.moe_parallel_config
        for reason, found in {
            f"the activation {self.activation}": self.activation not in ACTIVATIONS,
            "biases": moe.has_bias,
            "a clamp before the activation": moe.swiglu_limit is not None,
            "data parallel or context parallel ranks": parallel.dp_size * parallel.pcp_size * parallel.sp_size > 1,
            "vLLM's own LoRA": moe.is_lora_enabled,
        }.items():
            if found:
                raise UnsupportedLayerError(
                    f"{prefix}: packed experts with {reason} do not run in vLLM. Use Transformers; OmniQuant models"
                    " can also be written for vLLM's own kernels, with `hf-spqr export --format compressed-tensors`."
                )
        if get_current_vllm_config().compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
            raise UnsupportedLayerError(
                f"{prefix}: how many tokens each expert gets is read on the host, which a CUDA graph cannot hold."
                " Start vLLM with --enforce-eager (enforce_eager=True)."
            )

    def maybe_roundup_sizes(self, hidden: int, intermediate: int, *unused: Any) -> tuple[int, int]:
        return hidden, intermediate

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None  # vLLM's own kernels would need one

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters, one for each tensor that a file may hold of a projection; what is loaded is kept aside."""
        total, rank, size = layer.global_num_experts, self.moe.tp_rank, self.moe.tp_size
        slots = layer.expert_map
        if slots is None:
            try:
                first, last = chunk(total, rank, size, "experts")
            except ConfigError as error:
                raise ConfigError(f"{self.prefix}: {error} (tensor_parallel_size).") from error
            slots = torch.full((total,), -1)
            slots[first:last] = torch.arange(last - first)
        held = sorted((expert for expert in range(total) if slots[expert] >= 0), key=slots.tolist().__getitem__)
        # tokens of other ranks' experts, and vLLM's -1 for no expert, go to one after the last
        slots = torch.cat([slots, slots.new_tensor([-1])]).long()
        layer.register_buffer("packed_slots", slots.masked_fill(slots < 0, len(held)), persistent=False)
        names = projection_names(self.prefix, self.moe.is_act_and_mul)
        layer.packed_loaded = _Loaded(names, held)
        for stem in ("w13", "w2"):
            for name in (*self.grouped_class.linear_class.tensor_names, "perm", "weight"):
                dtype = params_dtype if name == "weight" else torch.int32
                empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                set_weight_attrs(empty, {"weight_loader": partial(layer.packed_loaded.add, name)})
                layer.register_parameter(f"{stem}_{name}", empty)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Join what was loaded. Raises CheckpointError if a tensor lacks or does not fit the config."""
        loaded: _Loaded | None = layer.__dict__.pop("packed_loaded", None)
        if loaded is None:
            return
        for stem in ("w13", "w2"):
            for name in (*self.grouped_class.linear_class.tensor_names, "perm"):
                delattr(layer, f"{stem}_{name}")
        hidden, intermediate = self.moe.hidden_dim, self.moe.intermediate_size
        linears = {}
        for shard, name in loaded.names.items():
            shape = (hidden, intermediate) if shard == "w2" else (intermediate, hidden)
            linears[shard] = self._join(name, shape, loaded.of(shard))
        layer.packed_experts = nn.ModuleDict(linears)

    def _join(self, name: str, shape: tuple[int, int], experts: Sequence[dict[str, Tensor]]) -> GroupedLinear:
        names = {name, name.replace(".block_sparse_moe.", ".mlp.")}  # what Transformers calls the module now
        names |= {other.removeprefix("model.") for other in names}
        layout = self.config.layout(*shape, *names)
        try:
            specs = [{key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} for tensors in experts]
            self.grouped_class.empty(layout, specs)  # raises where a tensor lacks or does not fit
            check_order(name, self.config.stores_order(*names), "perm" in experts[0])
            linear = self.grouped_class.join(layout, experts, self.config.backend)
            linear.check()
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        if isinstance(linear, AffineGroupedLinear):
            linear.act_bits, linear.act_sym = self.config.act_bits, self.config.act_sym  # type: ignore[attr-defined]
        return linear

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """x [T, hidden] by experts topk_ids [T, k] with topk_weights [T, k] -> [T, hidden], this rank's part of it.

        Shared experts are vLLM's: it computes and adds them.
        """
        top_k, weights = topk_ids.shape[-1], topk_weights.reshape(-1, 1)
        rows = x.repeat_interleave(top_k, 0)
        if layer.apply_router_weight_on_input:
            rows, weights = rows * weights.to(x.dtype), torch.ones_like(weights)
        linears = layer.packed_experts
        order, ends = by_expert(layer.packed_slots[topk_ids.reshape(-1).long()], linears["w2"].experts)
        rows = rows[order]
        y = ACTIVATIONS[self.activation](linears["w1"](rows, ends))
        if "w3" in linears:
            y = linears["w3"](rows, ends) * y
        y = linears["w2"](y, ends)
        y = torch.empty_like(y).index_copy(0, order, y) * weights
        return y.view(-1, top_k, x.shape[-1]).sum(1).to(x.dtype)


class _Loaded:
    """The tensors of the experts that this rank holds, by shard and expert; ``names`` of the projections by shard."""

    def __init__(self, names: dict[str, str], held: Sequence[int]) -> None:
        self.names, self.held = names, list(held)
        self.tensors: dict[tuple[str, int], dict[str, Tensor]] = {}
        self.device = torch.empty(0).device  # vLLM builds models with their device as the default one

    def add(
        self,
        name: str,
        param: Tensor,
        loaded_weight: Tensor,
        weight_name: str = "",
        shard_id: str = "",
        expert_id: int = 0,
        return_success: bool = False,
    ) -> bool:
        """vLLM's weight loader of the tensor called ``name``; the result says whether this rank holds the expert."""
        if name == "weight":
            if loaded_weight.numel():
                raise UnsupportedLayerError(
                    f"{weight_name}: these experts are not packed in the file, and `modules_to_not_convert` does not"
                    " name them. Quantize the model again with a pattern that does."
                )
            return True  # the empty tensor that stands for the experts in a file
        if expert_id not in self.held:
            return False
        # loaders reuse their memory
        self.tensors.setdefault((shard_id, expert_id), {})[name] = loaded_weight.to(self.device, copy=True)
        return True

    def of(self, shard: str) -> list[dict[str, Tensor]]:
        """The tensors of each expert. Raises CheckpointError if there are none of one."""
        for expert in self.held:
            if (shard, expert) not in self.tensors:
                raise CheckpointError(f"The checkpoint lacks expert {expert} of {self.names[shard]}; it is damaged.")
        return [self.tensors[shard, expert] for expert in self.held]
