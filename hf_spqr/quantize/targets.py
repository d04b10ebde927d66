"""Which layers of a model are quantized, and the checks that can be made before any work is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_spqr.calibration.blocks import Block, find_wholes, stored_parts
from hf_spqr.config import PackedConfig
from hf_spqr.errors import MISFITS, NonFiniteError, UnsupportedLayerError
from hf_spqr.nn import GroupedLinear, PackedLinear, dense
from hf_spqr.nn.experts import describe

__all__ = [
    "Target", "check_weights", "find_targets", "left_alone", "nothing_to_quantize", "refuse_packed",
    "selectable", "shared_parameters",
]  # fmt: skip


PIECE = 1 << 22
"""Numbers that are looked at together."""


@dataclass(frozen=True)
class Target:
    """A linear layer to quantize: its full name, its name inside its block, the index of the block."""

    name: str
    local_name: str
    block: int
    linear: nn.Module


def find_targets(model: nn.Module, blocks: Sequence[Block], config: PackedConfig) -> list[Target]:
    """The linear layers inside ``blocks`` that ``config`` does not exclude, in the model's order.

    Left out are layers whose weight has more than one place in the model, layers that must stay in float32 for the
    model, layers that score experts, layers that are so narrow that packing would not make them smaller, and where
    ``blocks`` are a whole decoder what is in none of its lists (a pooler, which not every head has).
    """
    wholes = [whole.module for [whole] in find_wholes(model)]
    shared = shared_parameters(model)
    keep = kept_in_float32(model)
    targets = []
    for index, block in enumerate(blocks):
        experts = _experts_beside(block.module)
        lists = tuple(stored_parts(model)) if any(block.module is whole for whole in wholes) else ("",)
        for local_name, module in block.module.named_modules():
            name = block.inside(local_name)
            if not name.startswith(lists) or not _is_linear(module):
                continue
            if config.excludes(name) or f"{name}.weight" in shared:
                continue
            if any(part in keep for part in name.split(".")) or _scores(local_name, module, experts):
                continue
            if config.layout(*dense.features(module), name).fixed_bytes < dense.matrix(module).nbytes:
                targets.append(Target(name, local_name, index, module))
    return targets


def shared_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that are tied to others, or that modules with several places in ``model`` have."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    named = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    places = Counter(parameter for _, parameter in named)
    return {*tied, *tied.values(), *(name for name, parameter in named if places[parameter] > 1)}


def kept_in_float32(model: nn.Module) -> set[str]:
    """Parts of module names that the model wants in float32 whatever its dtype."""
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return {part for name in names for part in getattr(model, name, None) or ()}


def refuse_packed(model: nn.Module) -> None:
    """Raise UnsupportedLayerError for a model with packed layers: one config cannot describe both runs."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | GroupedLinear):
            raise UnsupportedLayerError(
                f"{type(model).__name__} is quantized already ({name} is packed): quantize the model that it was made"
                " from, or what model.dequantize() gives."
            )


def nothing_to_quantize(model: nn.Module, blocks: Sequence[Block]) -> UnsupportedLayerError:
    """The error to raise where a model has no target."""
    kinds = sorted({type(m).__name__ for b in blocks for m in b.module.modules() if not list(m.children())})
    return UnsupportedLayerError(
        f"Nothing to quantize in {type(model).__name__}: its blocks hold no nn.Linear, no Conv1D and no fused experts"
        f" that the config allows and that packing makes smaller (they hold {', '.join(kinds)}). Check"
        " modules_to_not_convert and group_size."
    )


def _experts_beside(block: nn.Module) -> dict[str, set[int]]:
    """How many experts there are, or other modules in a list, by the name of the module that has them and others."""
    found: dict[str, set[int]] = {}
    for name, module in block.named_modules():
        if not isinstance(module, nn.ModuleList) and not _holds_matrices(module):
            continue
        owner = name.rpartition(".")[0]
        if owner and all(map(_holds_matrices, block.get_submodule(owner).children())):  # it is all of the experts
            owner = owner.rpartition(".")[0]
        if isinstance(module, nn.ModuleList):
            sizes = {len(module)}
        else:
            sizes = {len(parameter) for parameter in module.parameters(recurse=False) if parameter.dim() == 3}
        found.setdefault(owner, set()).update(sizes)
    return found


def _scores(name: str, layer: nn.Module, experts: Mapping[str, set[int]]) -> bool:
    """Whether ``layer`` is the one of a router that has an output for every expert beside it."""
    outputs = dense.features(layer)[0]
    return any(outputs in sizes and (not owner or name.startswith(f"{owner}.")) for owner, sizes in experts.items())


def _is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer, or a subclass that computes the same (Falcon's, for example)."""
    if type(module) in dense.DENSE_CLASSES:
        return True
    if not isinstance(module, nn.Linear):
        return False
    weight, bias = module.weight, module.bias
    if {name for name, _ in module.named_parameters()} - {"weight", "bias"}:
        return False
    if weight.is_meta:  # cannot be tried
        return True
    with torch.no_grad():
        probe = torch.linspace(-1, 1, module.in_features, dtype=weight.dtype, device=weight.device)[None]
        try:
            output = module(probe)
        except MISFITS:  # it takes something else (DeepSeek-V4's grouped projection)
            return False
        expected = nn.functional.linear(probe, weight, bias)
        return isinstance(output, Tensor) and torch.allclose(output, expected, rtol=1e-2, atol=1e-2)


def left_alone(model: nn.Module, chosen: Collection[str]) -> list[str]:
    """Names of the linear layers and experts of ``model`` that are not among ``chosen``."""
    found = [n for n, m in model.named_modules() if isinstance(m, dense.DENSE_CLASSES) or _holds_matrices(m)]
    return [name for name in found if name not in chosen]


def _holds_matrices(module: nn.Module) -> bool:
    """Whether ``module`` has several matrices in one parameter, as experts have, also those of an unknown shape."""
    if type(module).__module__.startswith("torch.nn."):  # convolutions
        return False
    return any(parameter.dim() == 3 and len(parameter) > 1 for parameter in module.parameters(recurse=False))


def selectable(model: nn.Module) -> list[str]:
    """The names that a pattern of the config may select: of all modules, and of the projections of experts."""
    names = []
    for name, module in model.named_modules():
        kind = describe(module)
        names += [name, *(f"{name}.{projection}" for projection in (kind.projections if kind is not None else ()))]
    return names


def check_weights(model: nn.Module, layers: Mapping[str, nn.Module], config: PackedConfig) -> None:
    """Check the parameters of ``model``, whose ``layers`` (by name) are to be quantized, before any work is done.

    Raises:
        NonFiniteError: a parameter, but of a layer that ``config`` excludes, has NaN or infinity.
        UnsupportedLayerError: a layer to quantize has no data.
    """
    for name, layer in layers.items():
        for kind, parameter in layer.named_parameters():
            if parameter.is_meta:
                raise UnsupportedLayerError(
                    f"{name}.{kind} has no data (it is on the meta device or offloaded to disk): quantize the"
                    " model on the CPU, save it, and load the result with the device map you want."
                )
    for name, parameter in model.named_parameters():
        excluded = config.excludes(name.rpartition(".")[0])
        if not parameter.is_meta and not excluded and not _is_finite(parameter):
            raise NonFiniteError(
                f"{name} contains NaN or infinity: the checkpoint is damaged, or float16 overflowed in a conversion."
                " Load it in bfloat16 or float32, or exclude the layer with modules_to_not_convert."
            )


def _is_finite(parameter: Tensor) -> bool:
    """Whether all numbers are, a piece at a time: embeddings are large."""
    return all(bool(torch.isfinite(piece).all()) for piece in parameter.detach().reshape(-1).split(PIECE))
