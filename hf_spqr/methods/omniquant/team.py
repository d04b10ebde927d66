"""Processes that learn a block together: each has all samples and takes its share of every step's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Team"]

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """One of ``size`` processes, or the only one. ``add`` gives the sum of a tensor over all of them."""

    rank: int = 0
    size: int = 1
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def mine(self, items: Sequence[T]) -> list[T]:
        """What falls to this process: every ``size``-th of ``items``."""
        return list(items[self.rank :: self.size])

    def sum(self, value: float) -> float:
        """The sum of ``value`` over the processes, the same to the bit on each."""
        return value if self.size == 1 else float(self.add(torch.tensor([value], dtype=torch.float64)))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes; a missing one counts as zero."""
        if self.size == 1 or not parameters:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = self.add(torch.cat([grad.flatten() for grad in grads]))
        for parameter, part in zip(parameters, total.split([grad.numel() for grad in grads]), strict=True):
            parameter.grad = part.view_as(parameter)
