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
    return _coded(_encode(_tiles(values), 2**bits - 1), values.shape[0])


def encode_weighted(values: Tensor, importance: Tensor, bits: int) -> Coded:
    """Like `encode`, then the second-level numbers are moved to the weighted least-squares fit of the values given
    their codes, wherever that lowers sum(importance * error^2) of the tile.

    Statistics of importance 0 (groups of nothing but outliers) have no say: they take the mean of the others.
    """
    top = 2**bits - 1
    wanted, weight = _tiles(values), _tiles(importance)
    total = weight.sum(1, keepdim=True).clamp_min_(1e-30)
    weight = weight / total
    mean = (weight * wanted).sum(1, keepdim=True)
    wanted = torch.where(weight > 0, wanted, mean)
    start = _encode(wanted, top)
    codes = start[0]
    centred = codes - (weight * codes).sum(1, keepdim=True)
    spread = (weight * centred.square()).sum(1)
    slope = (weight * centred * wanted).sum(1)
    usable = (spread > 1e-6) & (slope > 0)
    step = to_half(torch.where(usable, slope / spread.clamp_min(1e-30), start[1]), positive=True)
    offset = to_half(torch.where(usable, (codes - centred)[:, 0] - mean[:, 0] / step, start[2]))
    moved = _encode_with(wanted, step, offset, top)
    better = ((moved[3] - wanted).square_() - (start[3] - wanted).square_()).mul_(weight).sum(1) < 0
    chosen = [torch.where(better.view(-1, *[1] * (b.dim() - 1)), b, a) for a, b in zip(start, moved, strict=True)]
    return _coded((chosen[0], chosen[1], chosen[2], chosen[3]), values.shape[0])


_Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def _encode(tiles: Tensor, top: int) -> _Parts:
    """Codes [T, 16 n], step [T], offset [T], value [T, 16 n] of the min-max grid of each row of `tiles`."""
    low, high = tiles.aminmax(dim=1)
    # A spread below what float16 can resolve in the offset, -low / step, is widened: the values then share one code.
    spread = torch.maximum(high - low, torch.maximum(low.abs(), high.abs()) * 1e-3)
    step = to_half(spread / top, positive=True)
    return _encode_with(tiles, step, to_half(-low / step), top)


def _encode_with(tiles: Tensor, step: Tensor, offset: Tensor, top: int) -> _Parts:
    codes = (tiles / step[:, None]).add_(offset[:, None]).round_().clamp_(0, top)
    return codes, step, offset, (codes - offset[:, None]).mul_(step[:, None])


def _coded(parts: _Parts, groups: int) -> Coded:
    codes, step, offset, value = parts
    return Coded(_untile(codes, groups), step, offset, _untile(value, groups))


def _tiles(values: Tensor) -> Tensor:
    """[n, N] as [N / 16, 16 n]: what shares its second-level numbers in one row."""
    count = values.shape[0]
    return values.view(count, -1, ROWS).transpose(0, 1).reshape(-1, count * ROWS)


def _untile(tiles: Tensor, groups: int) -> Tensor:
    return tiles.view(-1, groups, ROWS).transpose(0, 1).reshape(groups, -1)


def to_half(values: Tensor, positive: bool = False) -> Tensor:
    """Round to what float16 stores (saturating); `positive` keeps results above 0 by the smallest float16."""
    limit = torch.finfo(torch.float16).max
    return values.clamp(2.0**-24 if positive else -limit, limit).half().to(values.dtype)
