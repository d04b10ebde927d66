"""SpQR for one layer: sensitive weights apart, small groups with two-level statistics, error propagation.

Paper: arXiv 2306.03078, Algorithm 1. `mode="reference"` takes every choice of the published engine; what
`mode="default"` does instead, and why, is in docs/spqr.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_spqr.errors import UnsupportedLayerError
from hf_spqr.formats.spqr import SpQRLayout, SpQRWeight
from hf_spqr.methods import spqr_fit, spqr_reference
from hf_spqr.methods.base import LayerResult, SpQRParams, check_inputs, energy_ratio, output_energy, relative_error
from hf_spqr.methods.descent import descend
from hf_spqr.methods.loop import State, propagate
from hf_spqr.methods.order import Plan, activation_order, plan_by_energy, plan_in_place
from hf_spqr.methods.solve import damped, inverse_factor
from hf_spqr.methods.spqr_statistics import ROWS, UnitStatistics


def quantize(weight: Tensor, hessian: Tensor, params: SpQRParams) -> LayerResult:
    """Quantize weight [N, K] (any float dtype) for inputs with Hessian H [K, K] ~ X^T X (any positive scale).

    Raises NonFiniteError on NaN or infinity in either, ConfigError on shapes that do not match, CalibrationError when
    H cannot be damped into a positive definite matrix, UnsupportedLayerError when an outlier is beyond float16.
    """
    check_inputs(weight, hessian)
    weight, hessian = weight.float(), hessian.float()
    rows, columns = weight.shape
    layout = params.layout(rows, columns)
    reference = params.reference

    diagonal = hessian.diagonal()
    perm = activation_order(diagonal) if params.permutes else None
    stored = diagonal if perm is None else diagonal[perm]
    if reference or perm is not None:
        plan = plan_in_place(columns, params.group_size, layout.groups_per_second)
    else:
        plan = plan_by_energy(stored, params.group_size, layout.groups_per_second)
    way = plan.columns if perm is None else perm[plan.columns]

    ordered = hessian[way][:, way]
    factor = inverse_factor(ordered, params.damping)
    work = pad_rows(weight).T[way].contiguous()
    if reference:
        work[ordered.diagonal() == 0] = 0
    threshold = absolute_threshold(work[:, :rows], factor.upper, params.outlier_threshold)

    original = None if reference else work.clone()
    fit_unit = spqr_reference.fit_unit if reference else spqr_fit.fit_unit

    def fit(groups: list[Tensor], costs: list[Tensor]) -> UnitStatistics:
        return fit_unit(groups, costs, threshold, params)

    state = propagate(work, factor.upper, plan, params.bits, fit, threshold).first(rows)
    if original is None:
        packed = assemble(state, layout, plan, perm)
        error = relative_error(weight, packed.dequantize(), hessian)
    else:
        original = original[:, :rows]
        target = damped(ordered, factor.percdamp)
        descend(state, original, target, plan, params.bits)
        packed = assemble(state, layout, plan, perm)
        added = (target.diagonal() - ordered.diagonal())[:, None]
        spent = float(state.loss.sum() - (added * (state.quantized() - original).square()).sum())
        error = energy_ratio(spent, output_energy(weight, hessian))
    return LayerResult(packed, error, factor.percdamp, factor.raised, packed.outlier_col.numel())


def absolute_threshold(work: Tensor, upper: Tensor, tau: float) -> float:
    """tau * mean_j(var(W_j) / U_jj^2) for work [K, N] in the order of `upper` (SpQR engine)."""
    if math.isinf(tau) or work.shape[1] < 2:
        return math.inf
    return tau * float((work.var(1) / upper.diagonal().square()).mean())


def pad_rows(weight: Tensor) -> Tensor:
    """Repeat the last row of weight [N, K] until N is a multiple of 16 (the second level covers 16 rows)."""
    missing = -weight.shape[0] % ROWS
    return torch.cat([weight, weight[-1:].expand(missing, -1)]) if missing else weight


def assemble(state: State[UnitStatistics], layout: SpQRLayout, plan: Plan, perm: Tensor | None) -> SpQRWeight:
    """The logical weight in stored column order; outliers become what is to be added to the dense value."""
    rows = layout.out_features
    back = torch.argsort(plan.columns)
    residual = torch.where(state.outlier, state.value - state.dense, 0.0)[back].T.half()
    if bool(residual.isinf().any()):
        raise UnsupportedLayerError(
            "An outlier is larger than float16 can hold (65504). Check the checkpoint, or exclude the layer with"
            " modules_to_not_convert."
        )
    # A residual that rounds to 0 in float16 would cost 32 bits for nothing.
    row, column = (residual != 0).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=rows)
    group_order = torch.argsort(torch.tensor([group.index for unit in plan.units for group in unit]))
    unit_order = torch.argsort(torch.tensor([unit[0].index for unit in plan.units]))
    scale_codes = torch.cat([unit.scales.codes for unit in state.grids])[group_order, :rows]
    zero_codes = torch.cat([unit.zeros.codes for unit in state.grids])[group_order, :rows]
    return SpQRWeight(
        layout=layout,
        codes=state.codes[back].T.contiguous(),
        scale_codes=scale_codes.T.to(torch.uint8).contiguous(),
        zero_codes=zero_codes.T.to(torch.uint8).contiguous(),
        second=torch.stack([unit.second() for unit in state.grids], dim=1)[:, unit_order].contiguous(),
        outlier_row=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        outlier_col=column.int(),
        outlier_value=residual[row, column],
        perm=None if perm is None else perm.int(),
    )
