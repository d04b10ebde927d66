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

    def replace(self, index: int, codes: Tensor) -> None:
        """Give group `index` other codes [N]."""
        self.codes[index] = codes
        self.value[index] = self.step.repeat_interleave(ROWS) * (codes - self.offset.repeat_interleave(ROWS))


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
    top = 2**bits - 1
    tiles = _tiles(values)
    low, high = tiles.amin((0, 2)), tiles.amax((0, 2))
    # A spread below what float16 can resolve in the offset, -low / step, is widened: the values then share one code.
    spread = torch.maximum(high - low, torch.maximum(low.abs(), high.abs()) * 1e-3)
    step = to_half(spread / top, positive=True)
    return encode_with(values, step, to_half(-low / step), top)


def encode_with(values: Tensor, step: Tensor, offset: Tensor, top: int) -> Coded:
    """Quantize statistics [n, N] with given second-level numbers [N / 16]."""
    codes = (_tiles(values) / step[:, None] + offset[:, None]).round_().clamp_(0, top)
    value = step[:, None] * (codes - offset[:, None])
    return Coded(codes.view_as(values), step, offset, value.view_as(values))


def refine(values: Tensor, importance: Tensor, start: Coded, bits: int, steps: int = 2) -> Coded:
    """Move the second-level numbers to those that fit values [n, N] best in the weighted square, given the codes;
    keep what is better, tile by tile; `steps` times."""
    top, wanted = 2**bits - 1, _tiles(values)
    weight = _tiles(importance) + 1e-6 * _tiles(importance).mean((0, 2), keepdim=True) + 1e-30

    def loss(coded: Coded) -> Tensor:
        return (_tiles(coded.value) - wanted).square_().mul_(weight).sum((0, 2))

    total = weight.sum((0, 2))
    best, best_loss = start, loss(start)
    for _ in range(steps):
        codes = _tiles(best.codes)
        mean_code = (weight * codes).sum((0, 2)) / total
        mean = (weight * wanted).sum((0, 2)) / total
        centred = codes - mean_code[:, None]
        spread = (weight * centred.square()).sum((0, 2))
        slope = (weight * centred * (wanted - mean[:, None])).sum((0, 2)) / spread.clamp_min(1e-30)
        usable = (spread > 1e-6 * total) & (slope > 0)
        step = to_half(torch.where(usable, slope, best.step), positive=True)
        offset = to_half(torch.where(usable, mean_code - mean / step, best.offset))
        tried = encode_with(values, step, offset, top)
        tried_loss = loss(tried)
        better = tried_loss < best_loss
        best_loss = torch.where(better, tried_loss, best_loss)
        best = encode_with(values, torch.where(better, step, best.step), torch.where(better, offset, best.offset), top)
    return best


def to_half(values: Tensor, positive: bool = False) -> Tensor:
    """Round to what float16 stores (saturating); `positive` keeps results above 0 by the smallest float16."""
    limit = torch.finfo(torch.float16).max
    return values.clamp(2.0**-24 if positive else -limit, limit).half().to(values.dtype)


def _tiles(values: Tensor) -> Tensor:
    """[n, N] as [n, N / 16, 16]."""
    return values.view(values.shape[0], -1, ROWS)
