"""Coordinate descent never raises the loss, and brings the outliers to their least-squares optimum."""

from itertools import pairwise

import pytest
import torch

from hf_spqr.methods.base import SpQRParams
from hf_spqr.methods.descent import descend
from hf_spqr.methods.loop import propagate
from hf_spqr.methods.order import plan_in_place
from hf_spqr.methods.solve import damped, inverse_factor
from hf_spqr.methods.spqr import absolute_threshold
from hf_spqr.methods.spqr_fit import fit_unit
from tests.methods.layers import random_layer

DAMPING = 0.03


def quantized(rows=32, columns=160, tau=0.1, group_size=16, per_unit=1):
    weight, hessian = random_layer(rows, columns)
    plan = plan_in_place(columns, group_size, per_unit)
    factor = inverse_factor(hessian, DAMPING)
    work = weight.T.contiguous()
    threshold = absolute_threshold(work, factor.upper, tau)
    params = SpQRParams()
    state = propagate(work.clone(), factor.upper, plan, 3, lambda g, c: fit_unit(g, c, threshold, params), threshold)
    return state, work, hessian, plan


def energy(state, original, hessian):
    difference = (torch.where(state.outlier, state.value, state.dense) - original).double()
    return float((difference * (hessian.double() @ difference)).sum())


@pytest.mark.parametrize("tau", [0.05, float("inf")])
@pytest.mark.parametrize("shape", [(160, 16, 1), (150, 16, 2), (200, -1, 1), (300, 128, 1)])
def test_descent_lowers_the_loss(tau, shape):
    columns, group_size, per_unit = shape
    state, original, hessian, plan = quantized(columns=columns, tau=tau, group_size=group_size, per_unit=per_unit)
    target = damped(hessian, DAMPING)
    losses = [energy(state, original, target)]
    for _ in range(3):
        descend(state, original, target, plan, 3)
        losses.append(energy(state, original, target))
    assert losses[1] < losses[0]
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(losses))
    scale = torch.cat([g.scale.repeat_interleave(16, 0) for g in state.grids]) if group_size == 16 else None
    if scale is not None and columns % 16 == 0:
        zero = torch.cat([g.zero.repeat_interleave(16, 0) for g in state.grids])
        torch.testing.assert_close(state.dense, scale * (state.codes.float() - zero))


@pytest.mark.parametrize("tau", [0.05, float("inf")])
def test_the_loss_is_kept(tau):
    state, original, hessian, plan = quantized(tau=tau)
    target = damped(hessian, DAMPING)
    for _ in range(2):
        assert float(state.loss.sum()) == pytest.approx(energy(state, original, target), rel=1e-4)
        descend(state, original, target, plan, 3)
    assert state.outlier.any() == (tau < 1)


def test_outliers_end_near_their_least_squares_optimum():
    """A few passes solve the least-squares problem of the outliers, so that no separate refit is needed."""
    state, original, hessian, plan = quantized()
    target = damped(hessian, DAMPING)
    for _ in range(5):
        descend(state, original, target, plan, 3)
    root = torch.linalg.cholesky(target.double()).T
    counts = state.outlier.sum(0)
    assert counts.max() > 3
    for row in range(original.shape[1]):
        at = state.outlier[:, row]
        fixed = torch.where(at, -original[:, row], state.dense[:, row] - original[:, row]).double()
        best = torch.linalg.lstsq(root[:, at], -(root @ fixed)[:, None]).solution[:, 0]
        torch.testing.assert_close(state.value[at, row].double(), best, rtol=2e-2, atol=1e-3)
