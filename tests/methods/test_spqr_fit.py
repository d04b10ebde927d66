"""The default statistics: better than min-max under the loss they are made for."""

import pytest
import torch

from hf_spqr.methods.base import SpQRParams
from hf_spqr.methods.spqr_fit import fit_unit, real_grid
from hf_spqr.methods.spqr_reference import fit_unit as reference_fit
from hf_spqr.methods.spqr_reference import min_max_grid


def loss(weight, cost, scale, zero, top, threshold):
    code = (weight / scale.clamp_min(1e-9) + zero).round().clamp(0, top)
    return ((scale * (code - zero) - weight).square() * cost).clamp(max=threshold).sum(0)


def group(seed, size=16, rows=64):
    torch.manual_seed(seed)
    weight = 0.02 * torch.randn(size, rows)
    weight *= 1 + 6 * (torch.rand(size, rows) < 0.03)
    return weight, torch.rand(size, 1).exp()


@pytest.mark.parametrize("threshold", [float("inf"), 1e-4])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 16, 100])
def test_real_grid_never_loses_to_min_max(threshold, size):
    weight, cost = group(0, size)
    scale, zero = real_grid(weight, cost, 7, threshold)
    simple = min_max_grid(weight.amin(0), weight.amax(0), 7)
    ours = loss(weight, cost, scale, zero, 7, threshold)
    assert (ours <= loss(weight, cost, *simple, 7, threshold) * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("threshold", [float("inf"), 1e-3])
def test_real_grid_goes_past_every_range_from_weight_to_weight(threshold):
    """The least-squares step lowers the loss of most groups, the choice between two extremes that of the others."""
    weight, cost = group(0, 16, 256)
    ours = loss(weight, cost, *real_grid(weight, cost, 7, threshold), 7, threshold)
    ordered = weight.sort(0).values
    ranges = [min_max_grid(ordered[low], ordered[high], 7) for low in (0, 1) for high in (-2, -1)]
    best = torch.stack([loss(weight, cost, *grid, 7, threshold) for grid in ranges]).amin(0)
    assert (ours <= best * (1 + 1e-5)).all()
    assert (ours < 0.99 * best).float().mean() > 0.8


@pytest.mark.parametrize("per_unit", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("stat_bits", [2, 3, 5])
@pytest.mark.parametrize("threshold", [float("inf"), 3e-4])
def test_unit_is_better_than_the_reference_on_the_whole(per_unit, bits, stat_bits, threshold):
    params = SpQRParams(bits=bits, scale_bits=stat_bits, zero_bits=stat_bits)
    groups, costs = zip(*[group(seed) for seed in range(per_unit)], strict=True)

    def total(fit):
        unit = fit(list(groups), list(costs), threshold, params)
        both = enumerate(zip(groups, costs, strict=True))
        return sum(float(loss(w, c, unit.scale[i], unit.zero[i], 2**bits - 1, threshold).sum()) for i, (w, c) in both)

    assert total(fit_unit) < total(reference_fit)


@pytest.mark.parametrize("value", [0.0, 0.03, -0.03])
def test_constant_groups_are_exact(value):
    weight = torch.full((16, 32), value)
    unit = fit_unit([weight], [torch.ones(16, 1)], float("inf"), SpQRParams())
    code = (weight / unit.scale[0].clamp_min(1e-9) + unit.zero[0]).round().clamp(0, 7)
    torch.testing.assert_close(unit.scale[0] * (code - unit.zero[0]), weight, rtol=0.02, atol=1e-6)


def test_a_price_of_nothing_leaves_everything_finite():
    weight, cost = group(3)
    unit = fit_unit([weight], [cost], 1e-30, SpQRParams())
    assert torch.isfinite(unit.scale).all() and torch.isfinite(unit.zero).all()
