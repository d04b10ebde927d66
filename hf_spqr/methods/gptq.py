"""GPTQ (arXiv 2210.17323): round to nearest, each column's error compensated by the columns that are still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.formats.affine import AffineWeight
from hf_spqr.methods.affine_grid import AffineGrid, min_max
from hf_spqr.methods.base import AffineParams, LayerResult, check_inputs, relative_error
from hf_spqr.methods.loop import propagate
from hf_spqr.methods.order import activation_order, plan_in_place
from hf_spqr.methods.solve import inverse_factor


def quantize(weight: Tensor, hessian: Tensor, params: AffineParams) -> LayerResult:
    """Quantize weight [N, K] for inputs with Hessian H [K, K] ~ X^T X (any positive scale).

    With `act_order` the columns are taken and stored by falling diag(H), and the result has a `perm`.
    Raises NonFiniteError on NaN or infinity in either, ConfigError on shapes that do not match, CalibrationError when
    H cannot be damped into a positive definite matrix.
    """
    check_inputs(weight, hessian)
    weight, hessian = weight.float(), hessian.float()
    rows, columns = weight.shape
    plan = plan_in_place(columns, params.group_size, 1)
    perm = activation_order(hessian.diagonal()) if params.act_order else None
    way = plan.columns if perm is None else perm
    factor = inverse_factor(hessian[way][:, way], params.percdamp)

    def fit(groups: list[Tensor], costs: list[Tensor]) -> AffineGrid:
        return min_max(groups[0], params)

    state = propagate(weight.T[way].contiguous(), factor.upper, plan, params.bits, fit)
    packed = AffineWeight(
        layout=params.layout(rows, columns),
        codes=state.codes.T.contiguous(),
        scales=torch.cat([grid.scale for grid in state.grids]).T.to(params.scale_dtype).contiguous(),
        zeros=None
        if params.symmetric
        else torch.cat([grid.zero for grid in state.grids]).T.to(torch.uint8).contiguous(),
        perm=None if perm is None else perm.int(),
    )
    error = relative_error(weight, packed.dequantize(), hessian)
    return LayerResult(packed, error, factor.percdamp, factor.raised)
