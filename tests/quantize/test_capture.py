"""Input moments of layers: over all calls of a layer, whether passes are stopped early or not."""

import pytest
import torch
from torch import nn

from hf_spqr.calibration.blocks import Call
from hf_spqr.quantize.capture import gather_hessians


class Block(nn.Module):
    """Calls its first layer twice, its last once, and one between them for every second batch only."""

    def __init__(self):
        super().__init__()
        self.twice, self.last, self.rare = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden_states):
        x = self.twice(self.twice(hidden_states) * 3)
        if hidden_states.sum() > 0:
            x = self.rare(x)
        return self.last(x)


@pytest.mark.parametrize("names", [["twice"], ["twice", "rare"], ["last"]])
def test_stopping_early_misses_no_call(names):
    block = Block()
    layers = {name: block.get_submodule(name) for name in names}
    hidden = [sign * torch.rand(1, 5, 8) for sign in (-1, 1, -1)]
    calls = [Call((), {})] * 3
    every = gather_hessians(block, layers, hidden, calls)
    stopped = gather_hessians(block, layers, hidden, calls, stop_early=True)
    for name in names:
        assert every[name].tokens == stopped[name].tokens == {"twice": 30, "rare": 5, "last": 15}[name]
        assert torch.equal(every[name].sum, stopped[name].sum)


def test_what_comes_after_the_layers_is_not_run():
    block, seen = Block(), []
    block.last.register_forward_hook(lambda *_: seen.append(1))
    hidden = [-torch.rand(1, 5, 8)] * 4
    gather_hessians(block, {"twice": block.twice}, hidden, [Call((), {})] * 4, stop_early=True)
    assert len(seen) == 1  # in the first pass, which counts the calls
