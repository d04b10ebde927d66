"""Leave-one-out scores in O(group) against their definition in O(group^2), float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_spqr.methods.spqr_outliers import fill_removed, leave_one_out, quantize_range, range_without_outliers


def by_definition(weight, cost, top):
    def error(group, group_cost):
        low, high = group.min(), group.max()
        return float(((group - quantize_range(group, low, high, top)).square() * group_cost).sum())

    scores = torch.empty_like(weight)
    for row in range(weight.shape[1]):
        base = error(weight[:, row], cost[:, 0])
        for k in range(weight.shape[0]):
            others = torch.arange(weight.shape[0]) != k
            scores[k, row] = base - error(weight[others, row], cost[others, 0])
    return scores


@settings(max_examples=40, deadline=None)
@given(
    group=st.integers(2, 20),
    top=st.sampled_from([3, 7, 15]),
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([0, 1, 2, 5]),
)
def test_equals_the_definition(group, top, seed, levels):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(group, 6, generator=g, dtype=torch.float64)
    if levels:  # ties, also among the extremes
        weight = weight.mul(levels).round()
    cost = torch.rand(group, 1, generator=g, dtype=torch.float64) + 0.1
    torch.testing.assert_close(leave_one_out(weight, cost, top), by_definition(weight, cost, top))


def test_an_outlier_leaves_the_range():
    weight = torch.linspace(-1, 1, 16).repeat(3, 1).T.contiguous()
    weight[5, 1] = 30.0
    low, high = range_without_outliers(weight, torch.ones(16, 1), 7, threshold=10.0)
    assert high.tolist() == [1.0, 1.0, 1.0] and low.tolist() == [-1.0, -1.0, -1.0]
    low, high = range_without_outliers(weight, torch.ones(16, 1), 7, threshold=float("inf"))
    assert high.tolist() == [1.0, 30.0, 1.0]


def test_fill_removed():
    weight = torch.tensor([[1.0, 4.0], [3.0, 5.0], [8.0, 6.0]])
    keep = torch.tensor([[True, False], [True, False], [False, False]])
    assert fill_removed(weight, keep).tolist() == [[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]]


@pytest.mark.parametrize("group", [1, 2])
def test_tiny_groups(group):
    weight = torch.randn(group, 4)
    low, high = range_without_outliers(weight, torch.ones(group, 1), 7, threshold=0.1)
    assert (low <= high).all()
