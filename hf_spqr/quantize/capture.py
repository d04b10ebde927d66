"""What the layers of a block see on the calibration data: one Hessian per distinct input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from hf_spqr.calibration.blocks import Call, replay
from hf_spqr.calibration.hessian import HessianAccumulator
from hf_spqr.errors import HfSpqrError
from hf_spqr.nn import dense

__all__ = ["gather_hessians", "hessian_or_identity", "shared_inputs"]


def hessian_or_identity(sums: HessianAccumulator) -> Tensor:
    """The Hessian, or the identity where no token has come (a branch that was never taken): all inputs weigh alike."""
    return sums.hessian() if sums.tokens else torch.eye(sums.in_features, device=sums.device)


class _Enough(Exception):
    """Ends the forward pass of a block: what comes after is not needed."""


@torch.no_grad()
def shared_inputs(block: nn.Module, layers: Mapping[str, nn.Module], hidden: Tensor, call: Call) -> list[list[str]]:
    """Groups of layer names that are given the very same tensor, in the order in which the block calls them.

    One call of the block on ``hidden`` decides. A layer that is called more than once in it, or not at all, is alone.
    """
    seen: list[tuple[str, Tensor]] = []  # holds the tensors, so that their identities stay unique

    with ExitStack() as hooks:
        for name, layer in layers.items():

            def note(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                seen.append((name, args[0]))

            hooks.callback(layer.register_forward_pre_hook(note).remove)
        replay(block, hidden, call)
    calls = [name for name, _ in seen]
    groups: dict[int | str, list[str]] = {}
    for name, tensor in seen:
        groups.setdefault(id(tensor) if calls.count(name) == 1 else name, []).append(name)
    for name in layers:
        if name not in calls:
            groups[name] = [name]
    return [list(dict.fromkeys(group)) for group in groups.values()]


@torch.no_grad()
def gather_hessians(
    block: nn.Module,
    layers: Mapping[str, nn.Module],
    hidden: Sequence[Tensor],
    calls: Sequence[Call],
    *,
    stop_early: bool = False,
) -> dict[str, HessianAccumulator]:
    """Run the block on every batch and return the accumulated input moments of ``layers`` by name.

    ``stop_early``: each pass ends as soon as all ``layers`` have been reached as often as in the first pass.

    Raises:
        NonFiniteError, CalibrationError: from the accumulator, with the name of the layer in front.
    """
    device = next(block.parameters()).device
    sums: dict[str, HessianAccumulator] = {}
    often: Counter[str] = Counter()  # calls in the first pass
    waiting: Counter[str] = Counter()
    with ExitStack() as hooks:
        for name, layer in layers.items():
            sums[name] = HessianAccumulator(dense.features(layer)[1], device)

            def add(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                try:
                    sums[name].add(args[0])
                except HfSpqrError as error:
                    raise type(error)(f"{name}: {error}") from error
                often[name] += first
                waiting[name] -= 1
                if stop_early and not first and all(left <= 0 for left in waiting.values()):
                    raise _Enough

            hooks.callback(layer.register_forward_pre_hook(add).remove)
        for number, (states, call) in enumerate(zip(hidden, calls, strict=True)):
            first = number == 0
            waiting = Counter({name: often[name] or 1 for name in layers})
            try:
                replay(block, states, call)
            except _Enough:
                pass
    return sums
