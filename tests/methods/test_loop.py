"""Error propagation against optimal brain quantization written out, float64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hf_spqr.methods.loop import propagate
from hf_spqr.methods.order import plan_by_energy, plan_in_place
from hf_spqr.methods.solve import damped, inverse_factor
from tests.methods.layers import random_layer


@dataclass
class FixedGrid:
    scale: Tensor
    zero: Tensor


def obq(weight, hessian, grids, plan, top, threshold):
    """Column by column: round, then the least-squares update of all that remain, by the inverse Hessian itself."""
    weight, inverse = weight.clone(), torch.linalg.inv(hessian)
    result, kept = torch.empty_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    for unit, grid in zip(plan.units, grids, strict=True):
        for place, group in enumerate(unit):
            for j in range(group.start, group.stop):
                code = (weight[j] / grid.scale[place] + grid.zero[place]).round().clamp(0, top)
                rounded = grid.scale[place] * (code - grid.zero[place])
                cost = (weight[j] - rounded).square() / inverse[j, j]
                kept[j] = cost > threshold
                result[j] = torch.where(kept[j], weight[j], rounded)
                weight[j + 1 :] -= torch.outer(inverse[j + 1 :, j] / inverse[j, j], weight[j] - result[j])
                row = inverse[j].clone()
                inverse -= torch.outer(row, row) / row[j]
    return result, kept


@pytest.mark.parametrize("shape", [(7, 40, 16, 1), (5, 150, 16, 2), (4, 70, -1, 1), (3, 300, 128, 1)])
@pytest.mark.parametrize("threshold", [float("inf"), 3e-6])
def test_equals_optimal_brain_quantization(shape, threshold):
    rows, columns, group_size, per_unit = shape
    weight, hessian = random_layer(rows, columns)
    weight, hessian = weight.T.double(), damped(hessian.double(), 0.01)
    for plan in (
        plan_in_place(columns, group_size, per_unit),
        plan_by_energy(torch.rand(columns), group_size, per_unit),
    ):
        w, h = weight[plan.columns].contiguous(), hessian[plan.columns][:, plan.columns]
        torch.manual_seed(0)
        grids = [
            FixedGrid(0.01 + 0.01 * torch.rand(len(u), rows).double(), 3 + torch.rand(len(u), rows).double())
            for u in plan.units
        ]
        waiting = iter(grids)
        state = propagate(
            w.clone(),
            inverse_factor(h, 0.0).upper,
            plan,
            3,
            lambda groups, costs, waiting=waiting: next(waiting),
            threshold,
        )
        expected, kept = obq(w, h, grids, plan, 7, threshold)
        result = torch.where(state.outlier, state.value, state.dense)
        torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-10)
        assert torch.equal(state.outlier, kept) and bool(kept.any()) == (threshold < 1)


def test_groups_are_fitted_to_updated_weights():
    weight, hessian = random_layer(4, 64)
    plan = plan_in_place(64, 16, 1)
    seen = []

    def fit(groups, costs):
        seen.append(groups[0].clone())
        assert costs[0].shape == (16, 1)
        return FixedGrid(torch.full((1, 4), 0.02), torch.full((1, 4), 3.0))

    work = weight.T.contiguous()
    propagate(work, inverse_factor(hessian, 0.01).upper, plan, 3, fit)
    assert torch.equal(seen[0], weight.T[:16]) and not torch.equal(seen[1], weight.T[16:32])
