"""Recording and replaying decoder blocks gives exactly what the model computes, on every architecture."""

import pytest
import torch
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from hf_spqr.calibration.blocks import Block, check_reads_text, find_blocks, find_stacks, record, replay
from hf_spqr.errors import CalibrationError, UnsupportedLayerError
from tests.architectures.rows import ARCHITECTURES as MATRIX
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


@pytest.mark.parametrize("kind", ["t5", "mt5", "bart"])
def test_encoder_and_decoder_are_two_stacks(kind):
    """Each stack is replayed exactly, for batches of different lengths too (T5's blocks hand a position bias on)."""
    model = next(a for a in MATRIX if a.kind == kind).build()
    stacks = find_stacks(model)
    assert [[b.name.split(".")[-3 if kind == "bart" else 0] for b in s] for s in stacks] == [
        ["encoder"] * 2, ["decoder"] * 2,
    ]  # fmt: skip
    assert find_blocks(model) == stacks[0] + stacks[1]
    batches = [torch.arange(3, 35)[None], torch.arange(40, 88).reshape(2, 24)]
    for stack in stacks:
        recording = record(model, stack, batches)
        hidden = recording.hidden
        for index, block in enumerate(stack):
            expected = []
            hook = block.module.register_forward_hook(
                lambda m, a, o, seen=expected: seen.append(o[0] if isinstance(o, tuple) else o)
            )
            with torch.no_grad():
                hidden = [replay(block.module, h, c) for h, c in zip(hidden, recording.calls[index], strict=True)]
                got = list(expected)
                expected.clear()
                for batch in batches:
                    shifted = torch.cat([torch.full_like(batch[:, :1], model.config.decoder_start_token_id), batch], 1)
                    model(input_ids=batch, decoder_input_ids=shifted[:, :-1], use_cache=False)
            hook.remove()
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_an_encoder_that_reads_no_tokens_is_refused():
    config = WhisperConfig(
        vocab_size=258, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedLayerError, match="input_features"):
        check_reads_text(WhisperForConditionalGeneration(config))


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


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_a_cache_that_the_model_fills_by_itself_is_not_kept(name):
    """It would hold the tokens of the recording when the block is called again."""

    class AddsAll(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, hidden_states, **kwargs):
            if kwargs[name] is not None:
                kwargs[name].append(hidden_states)
                hidden_states = torch.cat(kwargs[name], dim=1)
            return hidden_states.sum(1, keepdim=True) @ self.weight

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([AddsAll()])

        def forward(self, input_ids, use_cache):
            return self.layers[0](input_ids[..., None].expand(-1, -1, 4).float(), **{name: []})

    model = Model()
    recording = record(model, find_blocks(model), [torch.arange(8)[None]])
    replayed = [replay(model.layers[0], recording.hidden[0], recording.calls[0][0]) for _ in range(2)]
    assert torch.equal(replayed[0], torch.full((1, 1, 4), 4 * 28.0)) and torch.equal(*replayed)


def test_gradients_flow_through_replay():
    model = tiny_model("llama")
    blocks = find_blocks(model)
    recording = record(model, blocks, [torch.arange(8)[None]])
    replay(blocks[0].module, recording.hidden[0], recording.calls[0][0]).sum().backward()
    assert blocks[0].module.mlp.up_proj.weight.grad is not None


def test_model_without_blocks():
    with pytest.raises(UnsupportedLayerError, match="ModuleList"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_block_that_is_called_without_hidden_states():
    class Block0(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block0(4, 4)])

        def forward(self, input_ids, use_cache):
            return self.layers[0](x=input_ids[..., None].expand(-1, -1, 4).float())

    model = Model()
    with pytest.raises(UnsupportedLayerError, match=r"layers.0 \(Block0\) is not called with hidden states"):
        record(model, find_blocks(model), [torch.arange(8)[None]])


def test_block_that_is_never_called():
    model = tiny_model("llama")
    blocks = [*find_blocks(model), Block("elsewhere", nn.Linear(4, 4))]
    with pytest.raises(CalibrationError, match="elsewhere was called 0 times"):
        record(model, blocks, [torch.arange(8)[None]])
    with pytest.raises(CalibrationError, match="no calibration batches"):
        record(model, blocks, [])
