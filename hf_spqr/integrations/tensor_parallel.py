"""Transformers' tensor parallelism (``tp_plan="auto"``) for packed layers.

A model's plan says of each module how its parameters are divided among the ranks. For the tensors of packed layers it
gets rules of ours: they make the layer a :class:`~hf_spqr.nn.share.Share` of itself before it is loaded, and a weight
converter cuts that share out of each matrix, in host memory, while it is read. What happens around the forward pass
(adding up partial outputs, gathering) is Transformers' own.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ColwiseParallel,
    RowwiseParallel,
    TensorParallelLayer,
    replace_layer_number_by_wildcard,
)

from hf_spqr.errors import ConfigError, UnsupportedLayerError
from hf_spqr.integrations.experts import split_experts
from hf_spqr.nn import PackedExperts, PackedLinear
from hf_spqr.nn.share import ColumnShare, RowShare, Share, chunk

__all__ = [
    "TakeShare",
    "adapt_plans",
    "finish",
    "is_distributed",
    "refuse_to_dequantize",
    "refuse_to_quantize",
    "share_converters",
    "whole_state",
]

T = TypeVar("T")

PREFIX = "hf_spqr_"
EXPERTS = "moe_tp_experts"
KEYS = ("k_proj", "kv_b_proj", "qkv_proj", "query_key_value")
"""Layers whose rows are heads of keys; a plan that divides their rows divides attention by heads."""
GATHERED = ("colwise_rep", "colwise_gather_output")


class PackedStyle(TensorParallelLayer):
    """Divides the parameters of packed modules; those of other modules as the original ``style`` does.

    The layers of a model share a rule, and some of them may not be packed.
    """

    def __init__(self, style: str) -> None:
        self.style = style

    def validate_param(self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        if not isinstance(module, PackedLinear | PackedExperts):
            ALL_PARALLEL_STYLES[self.style].validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        if isinstance(module, PackedLinear):
            divides = type(ALL_PARALLEL_STYLES[self.style]).shard_param is not TensorParallelLayer.shard_param
            if param == "packed" and divides:
                module.hold(_share(module, self.style, mesh))
        elif isinstance(module, PackedExperts):
            if param == module.kind.fused:
                first, last = chunk(module.kind.experts, mesh.get_local_rank(), mesh.size(), "experts")
                module.hold(first, last, mesh.get_group())
        else:
            ALL_PARALLEL_STYLES[self.style].shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        if not isinstance(module, PackedExperts):
            return ALL_PARALLEL_STYLES[self.style].install_forward(module, mesh)
        compute, group = module.forward, mesh.get_group()

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if torch.is_grad_enabled() and hidden_states.requires_grad:
                raise UnsupportedLayerError("No gradient passes through divided experts: train in one process.")
            y = compute(hidden_states, *args, **kwargs)
            dist.all_reduce(y, group=group)
            return y

        module.forward = forward  # type: ignore[method-assign]
        return module


class RefusedStyle(TensorParallelLayer):
    """Stops where parameters would be divided that cannot be, before anything is loaded."""

    def __init__(self, why: str) -> None:
        self.why = why

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        raise UnsupportedLayerError(self.why)


REFUSED = {
    f"{PREFIX}refused_experts": "Packed experts are not divided by an expert-parallel plan (ep_size,"
    " enable_expert_parallel). Use tp_plan='auto', which divides them among the ranks too.",
    f"{PREFIX}refused_import": "Foreign checkpoints are rewritten while they are loaded and cannot be divided among"
    " ranks meanwhile. Rewrite it once with `hf-spqr convert`, then load the result with tp_plan='auto'.",
}


def adapt_plans(model: Any) -> None:
    """Add rules to the parallel plans of ``model``, whose layers are packed already, or stand ready to be imported.

    Nothing is done outside of a process group.
    """
    if not is_distributed():
        return
    for style in [name for name in ALL_PARALLEL_STYLES if not name.startswith(PREFIX)]:
        ALL_PARALLEL_STYLES.register(PREFIX + style, PackedStyle(style))  # type: ignore[arg-type]
    for name, why in REFUSED.items():
        ALL_PARALLEL_STYLES.register(name, RefusedStyle(why))  # type: ignore[arg-type]
    plan, expert_plan = model._tp_plan or {}, model._ep_plan or {}
    for name, module in model.named_modules():
        key = replace_layer_number_by_wildcard(name)
        if getattr(module, "is_foreign", False) and key in plan:
            leaves = {f"{key}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)}
            plan.update(dict.fromkeys(leaves, f"{PREFIX}refused_import"))
        elif isinstance(module, PackedLinear) and key in plan:
            plan.update({f"{key}.{leaf}": PREFIX + plan[key] for leaf in (*module.packed_tensors(), "weight")})
        elif isinstance(module, PackedExperts):
            leaves = {f"{key}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)}
            expert_plan.update({leaf: f"{PREFIX}refused_experts" for leaf in leaves & expert_plan.keys()})
            if plan.get(key) == EXPERTS:
                plan.setdefault(f"{key}.{module.kind.fused}", EXPERTS)
                leaves.add(key)  # Transformers adds up the outputs only where it has divided the weights itself
            plan.update({leaf: PREFIX + plan[leaf].removeprefix(PREFIX) for leaf in leaves & plan.keys()})


def _share(module: PackedLinear, style: str, mesh: Any) -> Share:
    """What this rank holds of ``module``. Raises ConfigError where ``style`` or the shape does not allow it."""
    known, rank, size, group = ALL_PARALLEL_STYLES[style], mesh.get_local_rank(), mesh.size(), mesh.get_group()
    if isinstance(known, ColwiseParallel):
        equal_only = not hasattr(known, "_from_local_last_dim_shard")  # Transformers 5.17
        if style in GATHERED and module.out_features % size and equal_only:
            raise ConfigError(
                f"{module.out_features} outputs cannot be gathered from {size} ranks by this version of Transformers:"
                " use a number of ranks that divides them, or a newer version."
            )
        return RowShare(module.layout, rank, size, group)
    if isinstance(known, RowwiseParallel):
        act_bits = getattr(module, "act_bits", None)
        return ColumnShare(module.layout, rank, size, group, ordered=module.perm is not None, act_bits=act_bits)
    raise ConfigError(
        f"The tensor-parallel plan divides a packed layer as {style!r}; packed layers can be divided colwise or"
        " rowwise, or be left out of the plan."
    )


class TakeShare(ConversionOps):
    """Cuts what this rank holds of a packed layer out of its tensors, as they are read from the file."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        tensors: dict[str, Tensor] = {re.sub(r"\W", "", key): value[0] for key, value in input_dict.items()}
        share = getattr(module, "share", None)
        if share is not None:
            module.check_tensors(share.whole, tensors)
            tensors = share.take(tensors)
        return {f".{name}": tensor for name, tensor in tensors.items()}


def share_converters(names: tuple[str, ...]) -> list[WeightConverter]:
    """What loads the tensors called ``names`` of packed layers in a process group; nothing outside of one."""
    if not is_distributed():
        return []
    sources = [rf"\.{name}" for name in (*names, "perm")]
    return [WeightConverter(sources, [r".packed"], [TakeShare()], force_cpu=True)]


def is_distributed() -> bool:
    """Whether there is a process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_divided(model: nn.Module) -> bool:
    """Whether the packed layers of ``model`` are divided among ranks."""
    return any(
        module.share is not None if isinstance(module, PackedLinear) else module.held is not None
        for module in model.modules()
        if isinstance(module, PackedLinear | PackedExperts)
    )


def refuse_to_dequantize(model: nn.Module) -> None:
    """Raise UnsupportedLayerError where packed layers are divided among ranks."""
    if is_divided(model):
        raise UnsupportedLayerError(
            "A packed model whose layers are divided among ranks cannot be dequantized: no rank holds all of it. Load"
            " it in one process, without tp_plan."
        )


def whole_state(model: nn.Module) -> dict[str, Any] | None:
    """The state of a model whose layers are divided, whole on the first rank, which writes it; None for any other.

    All ranks have to call this. What is not packed is left to Transformers to gather.
    """
    if not is_divided(model):
        return None
    state = split_experts(model, gather) or model.state_dict()
    for name, module in model.named_modules():
        share = getattr(module, "share", None)
        if share is None:
            continue
        held = gather({key: tensor.cpu() for key, tensor in share.tensors(module).items()}, share.group)
        if held is not None:
            state.update({f"{name}.{key}": tensor for key, tensor in share.rejoin(held).items()})
    return state


def gather(mine: T, group: Any) -> list[T] | None:
    """What the ranks of ``group`` have, on the first of them; None on the others."""
    every: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(mine, every, dst=dist.get_global_rank(group, 0), group=group)
    return every


def finish(model: nn.Module) -> None:
    """Complete the divided layers of a loaded model.

    Raises ConfigError where a plan of the caller's divided packed tensors as if they were ordinary ones, or where
    attention heads would be cut.
    """
    if not is_distributed():
        return
    from torch.distributed.tensor import DTensor

    _check_heads(model)
    for name, module in model.named_modules():
        if not isinstance(module, PackedLinear):
            continue
        if any(isinstance(tensor, DTensor) for tensor in module.packed_tensors().values()):
            raise ConfigError(
                f"{name}: this tp_plan has no rule for packed tensors. Use tp_plan='auto', with changes to single"
                " rules only for layers that are not packed."
            )
        if module.share is not None:
            module.share.finish(module)


def _check_heads(model: Any) -> None:
    sizes = {module.share.size for module in model.modules() if isinstance(module, PackedLinear) and module.share}
    divided = {key.rpartition(".")[2] for key, style in (model._tp_plan or {}).items() if style == "colwise"}
    if not sizes or not divided & set(KEYS):
        return
    size = max(sizes)
    for heads in key_heads(model.config.get_text_config()):
        if heads % size:
            raise ConfigError(
                f"{heads} heads of keys and values cannot be divided among {size} ranks: use a number of ranks that"
                " divides them."
            )


def key_heads(config: Any) -> list[int]:
    """The numbers of heads of keys and values that the blocks have."""
    found: list[int] = []
    for part in getattr(config, "per_layer_config", None) or [config]:  # a large Gemma 4 has others in some blocks
        heads = getattr(part, "num_key_value_heads", None) or part.num_attention_heads
        found += [heads] if isinstance(heads, int) else heads
    return found


def refuse_to_quantize(model: Any) -> None:
    """Raise ConfigError where a model that is to be quantized is divided among ranks."""
    if (getattr(model, "_tp_size", None) or 1) > 1 or getattr(model, "_device_mesh", None) is not None:
        raise ConfigError(
            "A model cannot be quantized while its layers are divided among ranks. Load it without tp_plan and"
            " distributed_config (all ranks of a process group then share the work), save it, and load the result"
            " with tp_plan='auto'."
        )
