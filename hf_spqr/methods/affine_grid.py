"""The min-max grid of a group with a 16-bit scale and an integer zero point: what RTN and GPTQ round to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_spqr.methods.base import AffineParams


@dataclass
class AffineGrid:
    """scale [n, N] (float32, exactly what scale_dtype stores, above 0) and integer zero [n, N] of n groups."""

    scale: Tensor
    zero: Tensor


def min_max(group: Tensor, params: AffineParams) -> AffineGrid:
    """Grid of one group [g, N]. The range always holds 0, so that the zero point is a code.

    Symmetric: zero = 2^(bits-1), scale = 2 max|w| / (2^bits - 1), as in GPTQ.
    """
    top = 2**params.bits - 1
    low, high = group.amin(0).clamp_max(0), group.amax(0).clamp_min(0)
    if params.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    limits = torch.finfo(params.scale_dtype)
    smallest = limits.smallest_normal if params.scale_dtype == torch.bfloat16 else 2.0**-24
    scale = ((high - low) / top).clamp(smallest, limits.max).to(params.scale_dtype).float()
    if params.symmetric:
        zero = torch.full_like(scale, 2.0 ** (params.bits - 1))
    else:
        zero = (-low / scale).round_().clamp_(0, top)
    return AffineGrid(scale[None], zero[None])
