"""Which layers of a model are quantized, and the checks that can be made before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_spqr.calibration.blocks import Block
from hf_spqr.config import PackedConfig
from hf_spqr.errors import NonFiniteError, UnsupportedLayerError

__all__ = ["Target", "check_weights", "find_targets", "left_alone"]


@dataclass(frozen=True)
class Target:
    """A linear layer to quantize: its full name, its name inside its block, the index of the block."""

    name: str
    local_name: str
    block: int
    linear: nn.Linear


def find_targets(model: nn.Module, blocks: Sequence[Block], config: PackedConfig) -> list[Target]:
    """The ``nn.Linear`` layers inside ``blocks`` that ``config`` does not exclude, in the model's order.

    Left out are layers whose weight is tied to another parameter, layers that must stay in float32 for the model, and
    layers that are so narrow that packing would not make them smaller.

    Raises:
        UnsupportedLayerError: nothing is left to quantize.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied, *tied.values()}
    keep = getattr(model, "_keep_in_fp32_modules", None) or ()
    targets = []
    for index, block in enumerate(blocks):
        for local_name, module in block.module.named_modules():
            name = f"{block.name}.{local_name}"
            if not _is_linear(module) or config.excludes(name) or f"{name}.weight" in tied_names:
                continue
            if any(part in keep for part in name.split(".")):
                continue
            rows, words = config.layout(module.out_features, module.in_features, name).packed_shape()
            if 4 * rows * words < module.weight.nbytes:
                targets.append(Target(name, local_name, index, module))
    if not targets:
        kinds = sorted({type(m).__name__ for b in blocks for m in b.module.modules() if not list(m.children())})
        raise UnsupportedLayerError(
            f"Nothing to quantize in {type(model).__name__}: none of the layers in its blocks is an nn.Linear that the"
            f" config allows (they are {', '.join(kinds)}). Check modules_to_not_convert; Conv1D and fused experts"
            " are not supported."
        )
    return targets


def _is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is an ``nn.Linear``, or a subclass that computes the same (Falcon's, for example)."""
    if type(module) is nn.Linear or not isinstance(module, nn.Linear):
        return type(module) is nn.Linear
    weight, bias = module.weight, module.bias
    if weight.is_meta or {name for name, _ in module.named_parameters()} - {"weight", "bias"}:
        return False
    with torch.no_grad():
        probe = torch.linspace(-1, 1, module.in_features, dtype=weight.dtype, device=weight.device)[None]
        return torch.allclose(module(probe), nn.functional.linear(probe, weight, bias), rtol=1e-2, atol=1e-2)


def left_alone(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Names of the linear layers of ``model`` that are not among ``targets``."""
    chosen = {target.name for target in targets}
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in chosen]


def check_weights(targets: Sequence[Target]) -> None:
    """Raise :class:`NonFiniteError` naming the first layer whose weight or bias has NaN or infinity."""
    for target in targets:
        for kind, parameter in target.linear.named_parameters():
            if parameter.is_meta:
                raise UnsupportedLayerError(
                    f"{target.name}.{kind} has no data (it is on the meta device or offloaded to disk): quantize the"
                    " model on the CPU, save it, and load the result with the device map you want."
                )
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(
                    f"{target.name}.{kind} contains NaN or infinity: the checkpoint is damaged, or float16 overflowed"
                    " in a conversion. Load it in bfloat16 or float32, or exclude the layer with"
                    " modules_to_not_convert."
                )
