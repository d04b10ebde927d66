"""Which layers are taken for linear ones."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_spqr import SpQRConfig
from hf_spqr.calibration.blocks import Block
from hf_spqr.quantize.targets import find_targets, left_alone


class Same(nn.Linear):
    """Computes what its parent does, as Falcon's layers do."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Grouped(nn.Linear):
    """Groups of inputs, each with rows of its own, as in DeepSeek-V4: takes no plain rows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("tgk,gnk->tgn", x, self.weight.unflatten(0, (4, -1)))


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (nn.Linear(64, 64), True),
        (Conv1D(64, 64), True),
        (Same(64, 64), True),
        (Scaled(64, 64), False),
        (Grouped(64, 64), False),
        (nn.Embedding(64, 64), False),
    ],
)
def test_a_layer_that_computes_something_else_is_left_alone(layer, taken):
    model = nn.ModuleDict({"layer": layer})
    found = find_targets(model, [Block("block", model)], SpQRConfig(bits=4))
    assert [target.name for target in found] == ["block.layer"] * taken


class Experts(nn.Module):
    """With two that have no second matrix, as in LongCat-Flash: of no shape that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(6, 32, 64))
        self.down_proj = nn.Parameter(torch.zeros(4, 64, 16))


def test_experts_of_an_unknown_shape_are_listed_as_left_alone():
    model = nn.ModuleDict({"experts": Experts(), "conv": nn.Conv1d(4, 4, 3), "gate": nn.Linear(64, 6)})
    model["conv"].place = nn.Parameter(torch.zeros(1, 4, 3))
    assert left_alone(model, []) == ["experts", "gate"]
    assert left_alone(model, ["gate"]) == ["experts"]
