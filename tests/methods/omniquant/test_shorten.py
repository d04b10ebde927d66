from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_spqr.calibration.blocks import find_blocks, record
from hf_spqr.methods.omniquant.runner import BlockRunner
from hf_spqr.methods.omniquant.shorten import short_call
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "opt"])
def test_a_causal_call_is_cut(kind: str, attention: str) -> None:
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    blocks = find_blocks(model)
    recording = record(model, blocks, [torch.randint(1, 250, (1, 40))])
    runner = BlockRunner(blocks[0].module, recording.calls[0][0].kwargs, [])
    hidden, kwargs = short_call(runner, recording.hidden[0], tokens=12)
    assert hidden.shape == (1, 12, 64)
    BlockRunner(blocks[0].module, kwargs, [])(hidden, [0])
    assert short_call(runner, recording.hidden[0], tokens=40)[0].shape == (1, 40, 64)


def test_a_block_that_looks_ahead_is_not_cut() -> None:
    class Ahead(nn.Linear):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states + hidden_states.mean(1, keepdim=True))

    hidden = torch.randn(1, 30, 8)
    assert short_call(BlockRunner(Ahead(8, 8), {}, []), hidden, tokens=10)[0].shape == (1, 30, 8)
