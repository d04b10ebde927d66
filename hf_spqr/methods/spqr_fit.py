"""Statistics of a unit of groups in mode "default": the grid that costs least when outliers have a price.

A weight that would be off by e costs min(e^2 / U_jj^2, T): past the threshold T it is kept apart as an outlier. So one
loss decides about ranges, codes of scales and zeros, and outliers together (docs/spqr.md). The published engine
instead scores outliers one at a time and then takes the min-max range of what is left.

Tensors are transposed, [g, N]; `cost` [g, 1] is 1 / U_jj^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.methods.base import SpQRParams
from hf_spqr.methods.loop import safe
from hf_spqr.methods.spqr_statistics import ROWS, Coded, UnitStatistics, encode_weighted

EXTREMES = 2
WINDOW = 8


def fit_unit(groups: list[Tensor], costs: list[Tensor], threshold: float, params: SpQRParams) -> UnitStatistics:
    """Scales and zeros for weights [g, N] of each group as they are now; N a multiple of 16.

    First real-valued grids, then the second level of the scales, zeros that fit the quantized scales, their second
    level, and last the pair of codes that costs least.
    """
    top = 2**params.bits - 1
    both = list(zip(groups, costs, strict=True))
    grids = [real_grid(group, cost, top, threshold) for group, cost in both]
    kept = [_kept(group, cost, *grid, top, threshold) for (group, cost), grid in zip(both, grids, strict=True)]
    scale_weight = torch.stack([_spread(weight, code) for weight, code in kept])
    scales = encode_weighted(torch.stack([grid[0] for grid in grids]), scale_weight, params.scale_bits)
    zeros, zero_weight = [], []
    for (group, cost), grid, scale in zip(both, grids, scales.value, strict=True):
        weight, code = _kept(group, cost, scale, grid[1], top, threshold)
        total = weight.sum(0)
        centre = (weight * (code - group / safe(scale))).sum(0) / total.clamp_min(1e-30)
        zeros.append(torch.where(total > 0, centre, grid[1]))
        zero_weight.append(total * scale.square())
    coded = encode_weighted(torch.stack(zeros), torch.stack(zero_weight), params.zero_bits)
    for index, (group, cost) in enumerate(both):
        _choose_codes(index, group, cost, scales, coded, threshold, params)
    return UnitStatistics(scales, coded)


def real_grid(weight: Tensor, cost: Tensor, top: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Best scale and zero ([N], [N]) among the ranges from one of the two smallest to one of the two largest
    weights, then one step of least squares if that lowers the loss."""
    count = EXTREMES if weight.shape[0] > 2 * EXTREMES else 1
    lows, highs = _smallest(weight, count), -_smallest(-weight, count)
    low = lows.repeat_interleave(count, 0)
    high = highs.repeat(count, 1)
    # A range of one point is widened to hold 0: a constant group is then exact.
    scale = ((high - low) / top).clamp_min(0)
    flat = scale <= 1e-9
    scale = torch.where(flat, high.abs() / top, scale).clamp_min(1e-9)
    zero = -torch.where(flat, low.clamp_max(0), low) / scale
    loss = _loss(weight, cost, scale, zero, top, threshold)
    best = _place_of_least(loss)
    scale, zero = scale.gather(0, best)[0], zero.gather(0, best)[0]

    kept, code = _kept(weight, cost, scale, zero, top, threshold)
    total = kept.sum(0).clamp_min(1e-30)
    mean_code, mean = (kept * code).sum(0) / total, (kept * weight).sum(0) / total
    code = code - mean_code
    spread = (kept * code.square()).sum(0)
    slope = (kept * code * (weight - mean)).sum(0) / spread.clamp_min(1e-30)
    slope = torch.where((spread > 1e-6 * total) & (slope > 1e-9), slope, scale)
    refitted = torch.stack([scale, slope]), torch.stack([zero, mean_code - mean / slope])
    better = _place_of_least(_loss(weight, cost, *refitted, top, threshold))
    return refitted[0].gather(0, better)[0], refitted[1].gather(0, better)[0]


def _choose_codes(
    index: int, weight: Tensor, cost: Tensor, scales: Coded, zeros: Coded, threshold: float, params: SpQRParams
) -> None:
    """Replace the codes of group `index` by the pair of least loss among 8 neighbouring scale codes (all, at 3 bit),
    and for each of them four zero codes about the one that keeps the centre of the grid where it is."""
    top, zero_top = 2**params.bits - 1, 2**params.zero_bits - 1
    zero_step, zero_offset = _rows(zeros.step), _rows(zeros.offset)
    centre = scales.value[index] * (top / 2 - zeros.value[index])
    scale_codes = _window(scales.codes[index], params.scale_bits)
    scale = _rows(scales.step) * (scale_codes - _rows(scales.offset))
    wanted = (top / 2 - centre / safe(scale)) / zero_step + zero_offset
    around = torch.arange(-2, 2, dtype=weight.dtype, device=weight.device)[:, None, None]
    zero_codes = wanted.round_().clamp_(2, zero_top - 1) + around
    zero = zero_step * (zero_codes - zero_offset)
    loss = torch.empty_like(zero)
    for place in range(scale.shape[0]):
        loss[:, place] = _loss(weight, cost, scale[place][None], zero[:, place], top, threshold)
    best = _place_of_least(loss.flatten(0, 1))
    scales.replace(index, scale_codes.gather(0, best % scale.shape[0])[0])
    zeros.replace(index, zero_codes.flatten(0, 1).gather(0, best)[0])


def _place_of_least(loss: Tensor) -> Tensor:
    """argmin over dim 0 of [c, N], as [1, N] (faster than torch's own, which does not vectorise over N)."""
    places = torch.arange(loss.shape[0], device=loss.device)[:, None]
    return torch.where(loss == loss.amin(0), places, 0).amax(0, keepdim=True)


def _loss(weight: Tensor, cost: Tensor, scale: Tensor, zero: Tensor, top: int, threshold: float) -> Tensor:
    """Loss [c, N] of each of c grids, given as scale [c or 1, N] and zero [c, N], for weight [g, N]."""
    wanted = weight / safe(scale)[:, None] + zero[:, None]
    error = wanted.round().clamp_(0, top).sub_(wanted).mul_(scale[:, None]).square_().mul_(cost)
    if threshold != float("inf"):
        error.clamp_max_(threshold)
    return error.sum(1)


def _kept(
    weight: Tensor, cost: Tensor, scale: Tensor, zero: Tensor, top: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """Importance [g, N] (the cost; 0 for outliers) and code of each weight on a grid."""
    code = (weight / safe(scale)).add_(zero).round_().clamp_(0, top)
    error = (code - zero).mul_(scale).sub_(weight).square_().mul_(cost)
    return torch.where(error <= threshold, cost, 0.0), code


def _spread(kept: Tensor, code: Tensor) -> Tensor:
    """How much the loss of a group grows with the square of a change of its scale, [N]; above 0 unless all of the
    group are outliers, so that a group of equal weights keeps its scale."""
    total = kept.sum(0)
    mean = (kept * code).sum(0) / total.clamp_min(1e-30)
    return (kept * (code - mean).square()).sum(0) + 1e-3 * total


def _smallest(weight: Tensor, count: int) -> Tensor:
    """The `count` smallest distinct values of each column, [count, N] (the last repeated where there are fewer)."""
    found = [weight.amin(0)]
    for _ in range(count - 1):
        following = torch.where(weight > found[-1], weight, torch.inf).amin(0)
        found.append(torch.where(torch.isfinite(following), following, found[-1]))
    return torch.stack(found)


def _window(codes: Tensor, bits: int) -> Tensor:
    """All codes of `bits` where these are at most 8, else 8 around `codes` [N]; float [c, N]."""
    size = min(2**bits, WINDOW)
    first = (codes - size // 2).clamp(0, 2**bits - size)
    return first + torch.arange(size, dtype=codes.dtype, device=codes.device)[:, None]


def _rows(values: Tensor) -> Tensor:
    """Second-level numbers [N / 16] for each of their rows, [N]."""
    return values.repeat_interleave(ROWS)
