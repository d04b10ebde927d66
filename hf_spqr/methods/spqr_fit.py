"""Statistics of a unit of groups in mode "default": the grid that costs least when outliers have a price.

A weight that would be off by e costs min(e^2 / U_jj^2, T): past the threshold T it is kept apart as an outlier. So one
loss decides about ranges, codes of scales and zeros, and outliers together (docs/spqr.md). The published engine instead
scores outliers one at a time and then takes the min-max range of what is left.

Tensors are transposed, [g, N]; `cost` [g, 1] is 1 / U_jj^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.methods.base import SpQRParams
from hf_spqr.methods.loop import safe
from hf_spqr.methods.spqr_statistics import ROWS, Coded, UnitStatistics, encode, refine

EXTREMES = 3
WINDOW = 8


def fit_unit(groups: list[Tensor], costs: list[Tensor], threshold: float, params: SpQRParams) -> UnitStatistics:
    """Scales and zeros for weights [g, N] of each group as they are now; N a multiple of 16.

    First real-valued grids, then the second level of the scales, zeros that fit the quantized scales, their second
    level, and last the pair of codes that costs least among all pairs (of 8 x 8 neighbours for statistics of more
    than 3 bits).
    """
    top = 2**params.bits - 1
    both = list(zip(groups, costs, strict=True))
    grids = [real_grid(group, cost, top, threshold) for group, cost in both]
    kept = [_kept(group, cost, *grid, top, threshold) for (group, cost), grid in zip(both, grids, strict=True)]
    scale_weight = torch.stack([_spread(weight, code) for weight, code in kept])
    scales = _encode(torch.stack([grid[0] for grid in grids]), scale_weight, params.scale_bits)
    zeros, zero_weight = [], []
    for (group, cost), grid, scale in zip(both, grids, scales.value, strict=True):
        weight, code = _kept(group, cost, scale, grid[1], top, threshold)
        total = weight.sum(0)
        centre = (weight * (code - group / safe(scale))).sum(0) / total.clamp_min(1e-30)
        zeros.append(torch.where(total > 0, centre, grid[1]))
        zero_weight.append(total * scale.square())
    coded = _encode(torch.stack(zeros), torch.stack(zero_weight), params.zero_bits)
    for index, (group, cost) in enumerate(both):
        _choose_codes(index, group, cost, scales, coded, threshold, params)
    return UnitStatistics(scales, coded)


def real_grid(weight: Tensor, cost: Tensor, top: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Best scale and zero ([N], [N]) among the ranges from one of the three smallest to one of the three largest
    weights (only the full range where there are no outliers), then one step of least squares if that lowers the loss."""
    count = EXTREMES if threshold != float("inf") and weight.shape[0] > 2 * EXTREMES else 1
    lows, highs = _smallest(weight, count), -_smallest(-weight, count)
    low = lows.repeat_interleave(count, 0)
    high = highs.repeat(count, 1)
    # A range of one point is widened to hold 0: a constant group is then exact.
    scale = ((high - low) / top).clamp_min(0)
    flat = scale <= 1e-9
    scale = torch.where(flat, high.abs() / top, scale).clamp_min(1e-9)
    zero = -torch.where(flat, low.clamp_max(0), low) / scale
    loss = _loss(weight, cost, scale, zero, top, threshold)
    best = loss.argmin(0, keepdim=True)
    scale, zero = scale.gather(0, best)[0], zero.gather(0, best)[0]

    kept, code = _kept(weight, cost, scale, zero, top, threshold)
    total = kept.sum(0).clamp_min(1e-30)
    mean_code, mean = (kept * code).sum(0) / total, (kept * weight).sum(0) / total
    code = code - mean_code
    spread = (kept * code.square()).sum(0)
    slope = (kept * code * (weight - mean)).sum(0) / spread.clamp_min(1e-30)
    slope = torch.where((spread > 1e-6 * total) & (slope > 1e-9), slope, scale)
    refitted = torch.stack([scale, slope]), torch.stack([zero, mean_code - mean / slope])
    better = _loss(weight, cost, *refitted, top, threshold).argmin(0, keepdim=True)
    return refitted[0].gather(0, better)[0], refitted[1].gather(0, better)[0]


def _choose_codes(
    index: int, weight: Tensor, cost: Tensor, scales: Coded, zeros: Coded, threshold: float, params: SpQRParams
) -> None:
    """Replace the codes of group `index` by the pair of least loss among the windows around them."""
    scale_codes, zero_codes = (
        _window(scales.codes[index], params.scale_bits),
        _window(zeros.codes[index], params.zero_bits),
    )
    candidates = _rows(zeros.step) * (zero_codes - _rows(zeros.offset))
    top = 2**params.bits - 1
    best_loss = torch.full_like(scales.codes[index], torch.inf)
    best_scale, best_zero = scales.codes[index].clone(), zeros.codes[index].clone()
    for codes in scale_codes:
        scale = _rows(scales.step) * (codes - _rows(scales.offset))
        loss, place = _loss(weight, cost, scale[None], candidates, top, threshold).min(0)
        better = (loss < best_loss) & (scale > 0)
        best_loss = torch.where(better, loss, best_loss)
        best_scale = torch.where(better, codes, best_scale)
        best_zero = torch.where(better, zero_codes.gather(0, place[None])[0], best_zero)
    scales.replace(index, best_scale)
    zeros.replace(index, best_zero)


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
    """How much the loss of a group grows with the square of a change of its scale, [N]."""
    total = kept.sum(0)
    mean = (kept * code).sum(0) / total.clamp_min(1e-30)
    return (kept * (code - mean).square()).sum(0)


def _encode(values: Tensor, importance: Tensor, bits: int) -> Coded:
    """Second level of statistics [n, N]: min-max of those that matter, then refined by weighted least squares.

    Where a group has only outliers (importance 0) its statistics have no say; they take the mean of the others.
    """
    silent = importance <= 0
    if bool(silent.any()):
        tiles = (values.shape[0], -1, ROWS)
        shown = ~silent.view(tiles)
        mean = (values.view(tiles) * shown).sum((0, 2)) / shown.sum((0, 2)).clamp_min(1)
        values = torch.where(silent, _rows(mean), values)
    return refine(values, importance, encode(values, bits), bits)


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
