"""The loop of error propagation over the columns of a layer (GPTQ, arXiv 2210.17323), with SpQR's outliers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from hf_spqr.methods.order import Plan, blocks


class Grid(Protocol):
    """What the loop must know of the statistics of a unit: scale and zero [n, N] of its n groups."""

    @property
    def scale(self) -> Tensor: ...

    @property
    def zero(self) -> Tensor: ...


GridT = TypeVar("GridT", bound=Grid)
FitUnit = Callable[[list[Tensor], list[Tensor]], GridT]
"""(weights [g, N] of each group of a unit as they are now, costs [g, 1] = 1 / U_jj^2 of their columns) -> grid."""


@dataclass
class State(Generic[GridT]):
    """A layer quantized in processing order, transposed: [K, N].

    codes uint8; dense: what the codes stand for; value: what the layer shall have where `outlier` (bool) is set;
    loss [N]: (Q - W)^T H (Q - W) of each row with the damped H; grids of the units of the plan, in its order.
    """

    codes: Tensor
    dense: Tensor
    value: Tensor
    outlier: Tensor
    loss: Tensor
    grids: list[GridT]

    def quantized(self) -> Tensor:
        """What the layer shall have everywhere."""
        return torch.where(self.outlier, self.value, self.dense)

    def first(self, rows: int) -> State[GridT]:
        """The state without the rows that were added as padding (the grids keep theirs)."""
        kept = [tensor[:, :rows] for tensor in (self.codes, self.dense, self.value, self.outlier)]
        return State(kept[0], kept[1], kept[2], kept[3], self.loss[:rows], self.grids)


def propagate(
    work: Tensor, upper: Tensor, plan: Plan, bits: int, fit: FitUnit[GridT], threshold: float = math.inf
) -> State[GridT]:
    """Quantize work [K, N] column by column in processing order; `work` is changed and becomes `value`.

    upper [K, K] is the factor of the inverse Hessian in the same order. A weight whose squared error over U_jj^2
    exceeds `threshold` stays as it is.
    """
    codes = torch.empty_like(work, dtype=torch.uint8)
    dense, errors = torch.empty_like(work), torch.empty_like(work)
    grids: list[GridT] = []
    top = 2**bits - 1
    spread = upper.diagonal().tolist()
    costs = upper.diagonal().square().reciprocal()[:, None]
    for block_start, block_stop, chunks in blocks(plan):
        for start, stop, due, position in chunks:
            if due is not None:
                spans = [slice(group.start, group.stop) for group in due]
                grids.append(fit([work[s] for s in spans], [costs[s] for s in spans]))
            scale, zero = grids[-1].scale[position], grids[-1].zero[position]
            step = safe(scale)
            for j in range(start, stop):
                code = (work[j] / step).add_(zero).round_().clamp_(0, top)
                codes[j] = code
                torch.mul(code.sub_(zero), scale, out=dense[j])
                error = torch.sub(work[j], dense[j], out=errors[j]).div_(spread[j])
                if threshold != math.inf:
                    error.masked_fill_(error.square() > threshold, 0.0)
                if j + 1 < stop:
                    work[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
            if stop < block_stop:
                work[stop:block_stop].addmm_(upper[start:stop, stop:block_stop].T, errors[start:stop], alpha=-1)
        rest = slice(block_stop, None)
        work[rest].addmm_(upper[block_start:block_stop, rest].T, errors[block_start:block_stop], alpha=-1)
    outlier = (errors == 0) & (work != dense)
    # W - Q = sum_j e_j U[j], with U^T U = H^-1: the squares of the scaled errors are the loss.
    return State(codes, dense, work, outlier, errors.square().sum(0), grids)


def safe(scale: Tensor) -> Tensor:
    """Scales to divide by: never 0 (SpQR engine: max(scale, 1e-9))."""
    return scale.clamp_min(1e-9)
