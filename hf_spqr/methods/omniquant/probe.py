"""A decoder block held in float64 with perturbed parameters, to measure how its parts depend on each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .double import KeepDouble, cast

EXACT = 1e-9  # largest relative deviation of two float64 results that count as the same function


def first_tensor(value: Any) -> Tensor | None:
    """The first floating tensor of a module's arguments or outputs."""
    items = value if isinstance(value, (tuple, list)) else [value]
    return next((item for item in items if isinstance(item, Tensor) and item.is_floating_point()), None)


class Probe:
    """``block`` as a function of its parameters, in float64, on one recorded input.

    hidden: ``[B, T, H]``; kwargs: what the block itself received. Vectors (norms, biases) are perturbed, so that a
    zero bias or a norm weight of one cannot hide a wrong site.
    """

    def __init__(self, block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], seed: int = 0) -> None:
        self.block, device = block, next(block.parameters()).device
        self.kwargs = cast(dict(kwargs), torch.float64, device)
        self.hidden = hidden.to(device, torch.float64)
        self.generator = torch.Generator().manual_seed(seed)
        self.modules = dict(block.named_modules())
        named = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        self.tensors = {name: self._perturbed(value.detach()) for name, value in named.items()}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.called: list[str] = []
        self.reference = self.run(record=True)

    def random(self, size: int, spread: float = 0.5) -> Tensor:
        """Log-normal factors ``[size]`` in float64."""
        noise = torch.randn(size, generator=self.generator, dtype=torch.float64)
        return (noise * spread).exp().to(self.hidden.device)

    def _perturbed(self, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        value = value.to(torch.float64)
        if value.dim() != 1:
            return value
        noise = torch.randn(value.shape, generator=self.generator, dtype=torch.float64).to(value.device)
        return value + 0.1 * noise

    @torch.no_grad()
    def run(
        self,
        changed: Mapping[str, Tensor] | None = None,
        *,
        scaled: tuple[str, Tensor] | None = None,
        record: bool = False,
    ) -> Tensor:
        """Output of the block with some tensors changed, or with the output of one module multiplied by a vector.

        With ``record`` the first tensor that goes into each module that owns parameters is kept in :attr:`inputs`.
        """
        with ExitStack() as stack:
            if record:
                self.inputs, self.outputs, self.called = {}, {}, []
                for name, module in self.modules.items():
                    if name and any(True for _ in module.parameters(recurse=False)):
                        handle = module.register_forward_pre_hook(self._keep_input(name), with_kwargs=True)
                        stack.callback(handle.remove)
                        stack.callback(module.register_forward_hook(self._keep_output(name)).remove)
            if scaled is not None:
                name, factor = scaled
                handle_out = self.modules[name].register_forward_hook(lambda m, a, out: out * factor)
                stack.callback(handle_out.remove)
            stack.enter_context(KeepDouble())
            tensors = {**self.tensors, **(changed or {})}
            out = functional_call(self.block, tensors, (self.hidden,), self.kwargs)
        result = first_tensor(out)
        if result is None:
            raise TypeError(f"the block returned no tensor: {type(out).__name__}")
        return result

    def _keep_input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = first_tensor([*args, *kwargs.values()])
            if value is not None:
                self.inputs[name] = value
            self.called.append(name)

        return hook

    def _keep_output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if isinstance(out, Tensor):
                self.outputs[name] = out

        return hook

    def recorded(self, scaled: tuple[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of the modules while the output of one of them is multiplied."""
        kept = self.inputs, self.outputs, self.called
        try:
            self.run(scaled=scaled, record=True)
            return self.inputs
        finally:
            self.inputs, self.outputs, self.called = kept

    def unchanged(self, changed: Mapping[str, Tensor]) -> bool:
        """Whether the block computes the same function with ``changed`` tensors."""
        deviation = self.run(changed) - self.reference
        moved = (self.reference - self.hidden).norm() if self.reference.shape == self.hidden.shape else None
        limit = EXACT * (self.reference.norm() if moved is None else moved)
        return bool(deviation.norm() <= limit)


def measured_index(before: Tensor, after: Tensor, factors: Tensor) -> Tensor | None:
    """Which of ``factors`` ``[S]`` multiplied each channel, or None where some channel did something else.

    before, after: ``[..., C]`` float64, the same input of a module without and with ``factors`` applied upstream.
    Returns int64 ``[C]``. Channels that are zero throughout cannot be measured: allowed only where all others say that
    channel i takes factor i.
    """
    if before.shape != after.shape:
        return None
    before, after = before.flatten(0, -2), after.flatten(0, -2)
    energy = before.square().sum(0)
    alive = energy > 0
    ratio = (before * after).sum(0) / energy.where(alive, torch.ones_like(energy))
    peak = before.abs().amax()
    if not bool(((after - ratio * before).abs() <= EXACT * peak * ratio.abs().clamp(min=1)).all()):
        return None
    ordered, order = factors.sort()
    at = torch.searchsorted(ordered, ratio.contiguous()).clamp(max=len(factors) - 1)
    left = (at - 1).clamp(min=0)
    at = torch.where((ordered[left] - ratio).abs() < (ordered[at] - ratio).abs(), left, at)
    good = (ordered[at] - ratio).abs() <= 1e-7 * ratio.abs()
    index = order[at]
    if not bool((good | ~alive).all()) or not bool(alive.any()):
        return None
    if not bool(alive.all()):
        own = torch.arange(len(index), device=index.device)
        if len(index) != len(factors) or not bool((index == own)[alive].all()):
            return None
        index = own
    return index
