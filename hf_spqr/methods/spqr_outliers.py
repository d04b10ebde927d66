"""Which weights of a group should not decide its range: leave-one-out scores (SpQR, Algorithm 1 `outliers`).

All tensors are transposed, [g, N]: g columns of a group for N output rows, so that a reduction over the group is a
reduction over dim 0. `cost` [g, 1] is the price of a squared error in a column, 1 / [U_jj]^2 of error propagation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_range(weight: Tensor, low: Tensor, high: Tensor, top: int) -> Tensor:
    """Round `weight` [g, N] to the grid of top + 1 points from low to high ([N]; a range of 0 is a single point)."""
    scale = (high - low) / top
    step = scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return (((weight - low) / step).round_().clamp_(0, top)).mul_(scale).add_(low)


def leave_one_out(weight: Tensor, cost: Tensor, top: int) -> Tensor:
    """Leave-one-out score [g, N]: how much the group's error falls when that weight is taken out of it.

    score_k = sum_j cost_j (w_j - Q(w_j))^2  -  sum_{j != k} cost_j (w_j - Q_k(w_j))^2,  where Q_k has the range of the
    group without k. Only the smallest and the largest weight of a group change the range when they leave, so three
    roundings of the group suffice, O(g) instead of O(g^2).
    """
    low, high = weight.amin(0), weight.amax(0)
    is_low, is_high = weight == low, weight == high
    infinity = torch.full_like(weight, torch.inf)
    low_two = torch.where(is_low, infinity, weight).amin(0)
    high_two = torch.where(is_high, -infinity, weight).amax(0)
    # An extreme that occurs twice stays in the range when one of the two leaves.
    low_two = torch.where((is_low.sum(0) > 1) | ~torch.isfinite(low_two), low, low_two)
    high_two = torch.where((is_high.sum(0) > 1) | ~torch.isfinite(high_two), high, high_two)

    def error(low: Tensor, high: Tensor) -> Tensor:
        return (weight - quantize_range(weight, low, high, top)).square_().mul_(cost)

    own = error(low, high)
    base = own.sum(0)
    without_low = error(low_two, high)
    without_high = error(low, high_two)
    score = own
    score = torch.where(is_low, base - (without_low.sum(0) - without_low), score)
    return torch.where(is_high & ~is_low, base - (without_high.sum(0) - without_high), score)


def range_without_outliers(weight: Tensor, cost: Tensor, top: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group ([N], [N]), with those that score above `threshold` replaced by the
    mean of the others."""
    if threshold == float("inf") or weight.shape[0] < 2:
        return weight.amin(0), weight.amax(0)
    filled = fill_removed(weight, leave_one_out(weight, cost, top) <= threshold)
    return filled.amin(0), filled.amax(0)


def fill_removed(weight: Tensor, keep: Tensor) -> Tensor:
    """Replace the removed weights of each group by the mean of the kept ones (by 0 where none is kept: the engine)."""
    mean = (weight * keep).sum(0) / keep.sum(0).clamp_min(1)
    return torch.where(keep, weight, mean)
