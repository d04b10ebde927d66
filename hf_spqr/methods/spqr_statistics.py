"""Two-level statistics: a scale and a zero per group and row, themselves quantized over 16 rows (SpQR, section 4.1).

Transposed layout throughout: [.., N] with N a multiple of 16; the second level covers 16 neighbouring rows (times the
groups of a unit). What comes out are the values a decoder will see: second-level numbers are rounded to float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 16


@dataclass
class Coded:
    """Quantized statistics of the n groups of a unit.

    codes float [n, N] (small integers); step, offset float [N / 16], exactly representable in float16;
    value [n, N] = step * (codes - offset).
    """

    codes: Tensor
    step: Tensor
    offset: Tensor
    value: Tensor


@dataclass
class UnitStatistics:
    """Scales and zeros of the groups of a unit."""

    scales: Coded
    zeros: Coded

    @property
    def scale(self) -> Tensor:
        """[n, N], as a decoder sees it."""
        return self.scales.value

    @property
    def zero(self) -> Tensor:
        """[n, N], as a decoder sees it."""
        return self.zeros.value

    def second(self) -> Tensor:
        """float16 [N / 16, 4]: (ss, sz, zs, zz)."""
        parts = (self.scales.step, self.scales.offset, self.zeros.step, self.zeros.offset)
        return torch.stack(parts, dim=1).to(torch.float16)


def encode(values: Tensor, bits: int) -> Coded:
    """Quantize statistics [n, N] to `bits`, min-max over each 16 rows x n groups."""
    count, columns = values.shape
    top = 2**bits - 1
    tiles = values.view(count, columns // ROWS, ROWS)
    low, high = tiles.amin((0, 2)), tiles.amax((0, 2))
    return encode_range(values, low, high, top)


def encode_range(values: Tensor, low: Tensor, high: Tensor, top: int) -> Coded:
    """Quantize statistics [n, N] to the grid of top + 1 points from low to high ([N / 16] each)."""
    count, columns = values.shape
    # A spread below what float16 can resolve in `offset` = -low / step is widened: the values then share one code.
    spread = torch.maximum(high - low, torch.maximum(low.abs(), high.abs()) * 1e-3)
    step = to_half(spread / top, positive=True)
    offset = to_half(-low / step)
    tiles = values.view(count, columns // ROWS, ROWS)
    codes = (tiles / step[:, None] + offset[:, None]).round_().clamp_(0, top)
    value = step[:, None] * (codes - offset[:, None])
    return Coded(codes.view(count, columns), step, offset, value.view(count, columns))


def to_half(values: Tensor, positive: bool = False) -> Tensor:
    """Round to what float16 stores (saturating); `positive` keeps results above 0 by the smallest float16."""
    limits = torch.finfo(torch.float16)
    low = limits.smallest_normal * 2.0**-10 if positive else limits.min
    return values.clamp(low, limits.max).half().to(values.dtype)
