"""Where learned transforms start, and what they are given to start from."""

from __future__ import annotations

import pytest
import torch

from hf_spqr.methods.omniquant.pairs import EquivalencePair, ScaleSite, ShiftSite
from hf_spqr.methods.omniquant.transforms import ChannelStatistics, Transforms, start_scales

BATCHES = (torch.tensor([[[2.0, -1.0, 0.0], [6.0, 3.0, 0.0]]]), torch.tensor([[[3.0, -5.0, 0.0], [5.0, 1.0, 0.0]]]))


def statistics() -> ChannelStatistics:
    found = ChannelStatistics()
    for batch in BATCHES:
        found.see("q", batch)
        found.see("k", batch)
    return found


def test_statistics_of_channels() -> None:
    found = statistics()
    assert found.low["q"].tolist() == [2, -5, 0] and found.high["q"].tolist() == [6, 3, 0]
    assert found.centre("q").tolist() == [4, -0.5, 0]  # the mean of (4, 1, 0) and (4, -2, 0)
    assert found.peak("q").tolist() == [6, 5, 0]
    assert found.peak("q", found.centre("q")).tolist() == [2, 4.5, 0]


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_scales_start_as_in_smoothquant_over_all_consumers(log: bool, shift: bool) -> None:
    """act ** alpha / weight ** (1 - alpha) of the largest activation and weight of a channel; 1 where one is 0."""
    weights = {"norm.weight": torch.ones(3), "q.weight": torch.tensor([[0.5, 2.0, 1.0], [-1.0, 1.0, 1.0]])}
    weights |= {"k.weight": torch.tensor([[3.0, 0.25, 1.0]]), "norm.bias": torch.zeros(3)}
    weights |= {"q.bias": torch.zeros(2), "k.bias": torch.zeros(1)}
    sites = (ScaleSite("norm.weight", 0, None, -1), *(ScaleSite(f"{name}.weight", 1, None, 1) for name in "qk"))
    shifts = (*(ShiftSite(f"{name}.bias", None, f"{name}.weight") for name in "qk"), ShiftSite("norm.bias", None))
    norm = EquivalencePair("norm -> q, k", "norm", 3, sites, shifts)
    free = EquivalencePair("q <-> k", "qk", 2, (ScaleSite("q.weight", 0, None, -1), ScaleSite("k.weight", 0, None, 1)))
    transforms = Transforms([norm, free], torch.device("cpu"), log, shift)
    start_scales(transforms, weights, statistics(), alpha=0.75)
    peak = torch.tensor([2.0, 4.5]) if shift else torch.tensor([6.0, 5.0])
    expected = peak**0.75 / torch.tensor([3.0, 2.0]) ** 0.25
    torch.testing.assert_close(transforms.scale(0), torch.cat([expected, torch.ones(1)]))
    assert torch.equal(transforms.scale(1), torch.ones(2))
    moved = transforms.shift(0)
    assert moved is None if not shift else moved is not None and moved.tolist() == [4, -0.5, 0]
