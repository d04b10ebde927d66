"""Recording and replaying decoder blocks gives exactly what the model computes, on every architecture."""

import pytest
import torch
from torch import nn

from hf_spqr.calibration.blocks import Block, find_blocks, record, replay
from hf_spqr.errors import CalibrationError, UnsupportedLayerError
from tests.tiny_models import ARCHITECTURES, tiny_model

MORE = ("bloom", "gpt2", "mixtral", "qwen3_moe", "starcoder2", "stablelm", "granite", "phi", "glm4", "smollm3")


def block_outputs(model, blocks, batch):
    """Outputs of every block in a plain forward pass."""
    outputs = []
    hooks = [b.module.register_forward_hook(lambda m, a, o: outputs.append(o)) for b in blocks]
    with torch.no_grad():
        model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [o[0] if isinstance(o, tuple) else o for o in outputs]


@pytest.mark.parametrize("kind", ARCHITECTURES + MORE)
def test_replay_is_exact(kind):
    model = tiny_model(kind)
    blocks = find_blocks(model)
    assert len(blocks) == 2
    assert all(model.get_submodule(block.name) is block.module for block in blocks)
    batches = [torch.arange(3, 35)[None], torch.arange(40, 104).reshape(2, 32)]
    expected = [block_outputs(model, blocks, batch) for batch in batches]
    recording = record(model, blocks, batches)
    hidden = recording.hidden
    assert [h.shape for h in hidden] == [(1, 32, 64), (2, 32, 64)]
    for index, block in enumerate(blocks):
        with torch.no_grad():
            pairs = zip(hidden, recording.calls[index], strict=True)
            hidden = [replay(block.module, h, call) for h, call in pairs]
        for got, outputs in zip(hidden, expected, strict=True):
            assert torch.equal(got, outputs[index])


def test_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    blocks = find_blocks(model)
    blocks[0].module.forward = custom = blocks[0].module.forward
    record(model, blocks, [torch.arange(8)[None]])
    assert model.training
    assert blocks[0].module.__dict__["forward"] is custom
    assert "forward" not in blocks[1].module.__dict__


def test_equal_arguments_are_kept_once():
    model = tiny_model("gemma2")
    blocks = find_blocks(model)
    recording = record(model, blocks, [torch.arange(16)[None], torch.arange(20, 36)[None]])
    first, second = recording.calls[0]
    assert first.kwargs["position_embeddings"][0] is second.kwargs["position_embeddings"][0]


def test_gradients_flow_through_replay():
    model = tiny_model("llama")
    blocks = find_blocks(model)
    recording = record(model, blocks, [torch.arange(8)[None]])
    replay(blocks[0].module, recording.hidden[0], recording.calls[0][0]).sum().backward()
    assert blocks[0].module.mlp.up_proj.weight.grad is not None


def test_model_without_blocks():
    with pytest.raises(UnsupportedLayerError, match="ModuleList"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_block_that_is_never_called():
    model = tiny_model("llama")
    blocks = [*find_blocks(model), Block("elsewhere", nn.Linear(4, 4))]
    with pytest.raises(CalibrationError, match="elsewhere was called 0 times"):
        record(model, blocks, [torch.arange(8)[None]])
    with pytest.raises(CalibrationError, match="no calibration batches"):
        record(model, blocks, [])
