"""Coordinate descent never raises the loss; the refit of outliers is torch's least squares."""

from itertools import pairwise

import pytest
import torch

from hf_spqr.methods.base import SpQRParams
from hf_spqr.methods.descent import descend, refit_outliers
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


def test_refit_is_least_squares():
    state, original, hessian, _ = quantized()
    added = DAMPING * float(hessian.diagonal().mean())
    target = hessian.double() + added * torch.eye(hessian.shape[0])
    root = torch.linalg.cholesky(target).T
    before = energy(state, original, damped(hessian, DAMPING))
    spent = refit_outliers(state, original, hessian, added)
    assert energy(state, original, damped(hessian, DAMPING)) < before
    assert spent == pytest.approx(energy(state, original, hessian), rel=1e-3)
    counts = state.outlier.sum(0)
    assert counts.min() != counts.max()
    for row in range(original.shape[1]):
        at = state.outlier[:, row]
        fixed = torch.where(at, -original[:, row], state.dense[:, row] - original[:, row]).double()
        best = torch.linalg.lstsq(root[:, at], -(root @ fixed)[:, None]).solution[:, 0]
        torch.testing.assert_close(state.value[at, row].double(), best, rtol=1e-3, atol=1e-5)


def test_refit_without_outliers_only_measures():
    state, original, hessian, _ = quantized(tau=float("inf"))
    assert not state.outlier.any()
    assert refit_outliers(state, original, hessian, 0.0) == pytest.approx(energy(state, original, hessian), rel=1e-4)
