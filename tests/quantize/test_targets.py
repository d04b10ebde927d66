"""Which layers are taken for linear ones."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_spqr import SpQRConfig
from hf_spqr.calibration.blocks import Block, find_blocks
from hf_spqr.quantize.experts import find_experts
from hf_spqr.quantize.targets import find_targets, left_alone
from tests.architectures.rows import ARCHITECTURES


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


def names(model, config=None):
    blocks = [Block(str(index), block) for index, block in enumerate(model)]
    return [target.name for target in find_targets(model, blocks, config or SpQRConfig(bits=4))]


class Fused(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(experts, 96, 64))
        self.down_proj = nn.Parameter(torch.randn(experts, 64, 96))
        self.act_fn = nn.SiLU()


class Gemm(nn.Module):
    """A projection of all experts, as Aria had two of in Transformers 5.17."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, 64, 96))


@pytest.mark.parametrize(
    "experts",
    [
        Fused(24),
        nn.ModuleList([nn.Linear(64, 64) for _ in range(24)]),
        nn.ModuleDict({"fc1": Gemm(24), "fc2": Gemm(24)}),
    ],
)
def test_the_layer_that_scores_the_experts_is_left_alone(experts):
    """By its number of outputs, beside the experts: other layers may have as many."""
    router = nn.ModuleDict({"inner": nn.Linear(64, 64), "scores": nn.Linear(64, 24)})
    mlp = nn.ModuleDict({"router": router, "experts": experts, "shared": nn.Linear(64, 96)})
    block = nn.ModuleDict({"attention": nn.Linear(64, 24), "mlp": mlp})
    found = [name for name in names(nn.ModuleList([block])) if ".experts." not in name]
    assert found == ["0.attention", "0.mlp.router.inner", "0.mlp.shared"]


def test_layers_with_several_places_are_left_alone():
    """A module, or a parameter, that two blocks have: packing it in one would take it from the other."""
    shared, one, other = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
    other.weight = one.weight
    blocks = [nn.ModuleDict({"own": nn.Linear(64, 64), "shared": shared, "tied": tied}) for tied in (one, other)]
    assert names(nn.ModuleList(blocks)) == ["0.own", "1.own"]
    experts = Fused(4)
    twice = nn.ModuleList([nn.ModuleDict({"experts": experts}), nn.ModuleDict({"experts": experts})])
    found = find_experts(twice, [Block(str(i), b) for i, b in enumerate(twice)], SpQRConfig(bits=4))
    assert found == []


def test_blocks_that_zamba_shares_are_left_alone():
    model = next(a for a in ARCHITECTURES if a.kind == "zamba2").build()
    found = find_targets(model, find_blocks(model), SpQRConfig(bits=4))
    assert found and not any("shared_transformer" in target.name for target in found)
