"""Which modules are taken for experts: those that compute what packed experts compute."""

import pytest
import torch
from torch import nn

from hf_spqr import SpQRConfig
from hf_spqr.calibration.blocks import Block
from hf_spqr.quantize.experts import find_experts
from tests.nn.test_experts import LAYOUTS, experts_module


def found(module: nn.Module) -> list[str]:
    model = nn.ModuleDict({"experts": module})
    return [target.name for target in find_experts(model, [Block("block", model)], SpQRConfig(bits=4))]


class Presorted(nn.Module):
    """Rows sorted by expert and no index, as in Llama 4."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 96) / 8)
        self.down_proj = nn.Parameter(torch.randn(4, 48, 64) / 7)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states):
        gate, up = torch.bmm(hidden_states.view(4, -1, 64), self.gate_up_proj).chunk(2, -1)
        return torch.bmm(self.act_fn(gate) * up, self.down_proj).view(-1, 64)


class InTurns(Presorted):
    """Gate and up rows in turns, which nothing but the code says."""

    def forward(self, hidden_states):
        y = torch.bmm(hidden_states.view(4, -1, 64), self.gate_up_proj)
        return torch.bmm(self.act_fn(y[..., ::2]) * y[..., 1::2], self.down_proj).view(-1, 64)


class Clamped(Presorted):
    def forward(self, hidden_states):
        gate, up = torch.bmm(hidden_states.view(4, -1, 64), self.gate_up_proj).chunk(2, -1)
        return torch.bmm(self.act_fn(gate).clamp(max=0.1) * up, self.down_proj).view(-1, 64)


class CalledInAnotherWay(Presorted):
    def forward(self, hidden_states, mask, capacity, weights):
        return super().forward(hidden_states)


class WithoutActivation(Presorted):
    """Has it in its forward."""

    def __init__(self) -> None:
        super().__init__()
        del self.act_fn

    def forward(self, hidden_states):
        gate, up = torch.bmm(hidden_states.view(4, -1, 64), self.gate_up_proj).chunk(2, -1)
        return torch.bmm(gate.relu() * up, self.down_proj).view(-1, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_of_every_layout_are_taken(layout, dtype):
    assert found(experts_module(**LAYOUTS[layout]).to(dtype)) == ["block.experts"]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_whatever_implementation_is_chosen(implementation, monkeypatch):
    module = experts_module()
    monkeypatch.setattr(module.config, "_experts_implementation", implementation)
    assert found(module) == ["block.experts"]


@pytest.mark.parametrize(
    ("module", "taken"),
    [
        (Presorted, True),
        (InTurns, False),
        (Clamped, False),
        (CalledInAnotherWay, False),
        (WithoutActivation, False),
    ],
)
def test_a_module_that_computes_something_else_is_left_alone(module, taken):
    torch.manual_seed(0)
    assert found(module()) == ["block.experts"] * taken
