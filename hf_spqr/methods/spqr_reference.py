"""The choices of the published engine for the statistics of a unit of groups (mode "reference")."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.methods.base import SpQRParams
from hf_spqr.methods.spqr_outliers import range_without_outliers
from hf_spqr.methods.spqr_statistics import UnitStatistics, encode


def fit_unit(groups: list[Tensor], costs: list[Tensor], threshold: float, params: SpQRParams) -> UnitStatistics:
    """Min-max range of what the leave-one-out scores leave, zero from the unquantized scale, both then quantized.

    groups: [g, N] each; costs: [g, 1] each, 1 / U_jj^2; threshold: the absolute T.
    """
    top = 2**params.bits - 1
    grids = [
        min_max_grid(*range_without_outliers(group, cost, top, threshold), top)
        for group, cost in zip(groups, costs, strict=True)
    ]
    scale = torch.stack([grid[0] for grid in grids])
    zero = torch.stack([grid[1] for grid in grids])
    return UnitStatistics(encode(scale, params.scale_bits), encode(zero, params.zero_bits))


def min_max_grid(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and real-valued zero of a grid of top + 1 points from low to high; from -1 to 1 where low == high.

    The latter is the engine's rule, kept for the reference: where all or all but one of the weights of a group are
    likely outliers its grid becomes useless, and so does the second level of its 16 rows: most of these weights then
    become outliers (0.1 % of all weights of the synthetic layer).
    """
    constant = low == high
    low, high = torch.where(constant, -1.0, low), torch.where(constant, 1.0, high)
    scale = (high - low) / top
    return scale, -low / scale
