"""Round to nearest: the baseline that needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.formats.affine import AffineWeight
from hf_spqr.methods.affine_grid import min_max
from hf_spqr.methods.base import AffineParams, LayerResult, check_inputs, relative_error


def quantize(weight: Tensor, params: AffineParams, hessian: Tensor | None = None) -> LayerResult:
    """Round weight [N, K] to the min-max grid of each group. `act_order` and `percdamp` have no meaning here.

    hessian: only to measure the error on the layer's output instead of on the weight.
    Raises NonFiniteError on NaN or infinity, ConfigError on wrong shapes.
    """
    check_inputs(weight, hessian)
    weight = weight.float()
    rows, columns = weight.shape
    layout = params.layout(rows, columns)
    transposed = weight.T.contiguous()
    codes = torch.empty_like(transposed, dtype=torch.uint8)
    scales, zeros = [], []
    width = columns if params.group_size < 0 else params.group_size
    for start in range(0, columns, width):
        group = transposed[start : start + width]
        grid = min_max(group, params)
        codes[start : start + width] = (group / grid.scale).add_(grid.zero).round_().clamp_(0, 2**params.bits - 1)
        scales.append(grid.scale)
        zeros.append(grid.zero)
    packed = AffineWeight(
        layout=layout,
        codes=codes.T.contiguous(),
        scales=torch.cat(scales).T.to(params.scale_dtype).contiguous(),
        zeros=None if params.symmetric else torch.cat(zeros).T.to(torch.uint8).contiguous(),
    )
    return LayerResult(packed, relative_error(weight, packed.dequantize(), hessian))
