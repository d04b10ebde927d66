"""Recording and replaying decoder blocks gives exactly what the model computes, on every architecture."""

import pytest
import torch
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from hf_spqr.calibration.blocks import (
    Block,
    NoChainError,
    check_reads_text,
    find_blocks,
    find_stacks,
    find_wholes,
    finish,
    record,
    replay,
    stored_parts,
)
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


@pytest.mark.parametrize("kind", ARCHITECTURES + MORE)
def test_what_comes_after_the_blocks_is_exact(kind):
    model = tiny_model(kind)
    blocks, batch = find_blocks(model), torch.arange(40, 104).reshape(2, 32)
    *_, last = block_outputs(model, blocks, batch)
    with torch.no_grad():
        assert torch.equal(finish(model, blocks, batch, last).logits, model(batch, use_cache=False).logits)
    assert not any("forward" in block.module.__dict__ for block in blocks)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_what_comes_after_an_encoder_is_the_decoder_too(kind):
    model = next(a for a in MATRIX if a.kind == kind).build()
    batch = torch.arange(3, 35)[None]
    shifted = torch.cat([torch.full_like(batch[:, :1], model.config.decoder_start_token_id), batch], 1)[:, :-1]
    with torch.no_grad():
        expected = model(input_ids=batch, decoder_input_ids=shifted, use_cache=False).logits
        for stack in find_stacks(model):
            seen = []
            hook = stack[-1].module.register_forward_hook(lambda m, a, o, seen=seen: seen.append(o))
            model(input_ids=batch, decoder_input_ids=shifted, use_cache=False)
            hook.remove()
            last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
            assert torch.equal(finish(model, stack, batch, last).logits, expected)


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


IDS = torch.arange(8)[None]


class Chain(nn.Module):
    """Two linear layers as blocks; ``run(blocks, hidden)`` says how they are called."""

    def __init__(self, run):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.run = run

    def forward(self, input_ids, use_cache=False):
        return self.run(self.layers, input_ids[..., None].expand(-1, -1, 4).float())


def test_model_without_blocks():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(NoChainError, match="ModuleList"):
        find_blocks(model)
    assert issubclass(NoChainError, UnsupportedLayerError)
    assert find_wholes(model) == [[Block("", model)]] and stored_parts(model) == [""]


def test_block_that_is_called_by_a_name_of_its_own():
    model = Chain(lambda blocks, hidden: blocks[1](input=blocks[0](input=hidden)))
    blocks = find_blocks(model)
    recording = record(model, blocks, [IDS])
    hidden = recording.hidden[0]
    for block, calls in zip(blocks, recording.calls, strict=True):
        hidden = replay(block.module, hidden, calls[0])
    assert torch.equal(hidden, model(IDS))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda b, h: b[1](b[0](b[0](h))), "layers.0 is called more than once"),
        (lambda b, h: b[0](b[1](h)), "layers.0 is not called before layers.1"),
        (lambda b, h: b[0](h), "layers.1 is not called"),
        (lambda b, h: b[1](b[0](h) * 2), "layers.1 is not given what layers.0 gives"),
        (lambda b, h: b[1](b[0](h)[:, 1:]), "layers.1 is not given what layers.0 gives"),
        (lambda b, h: b[0]([h]), r"layers.0 \(Linear\) is not called with hidden states"),
    ],
)
def test_blocks_that_are_no_chain(run, message):
    model = Chain(run)
    with pytest.raises(NoChainError, match=message):
        record(model, find_blocks(model), [IDS])
    assert all("forward" not in block.__dict__ for block in model.layers)


def test_hidden_states_may_change_their_dtype_between_blocks():
    model = Chain(lambda b, h: b[1](b[0](h.bfloat16().float()).float()))
    assert len(record(model, find_blocks(model), [IDS, IDS]).calls[1]) == 2


def test_no_calibration_batches():
    with pytest.raises(CalibrationError, match="no calibration batches"):
        record(Chain(None), find_blocks(Chain(None)), [])


def test_a_model_as_a_whole_is_a_block_that_reads_token_ids():
    model = tiny_model("llama")
    [[whole]] = find_wholes(model)
    assert whole.name == "model" and whole.inside("norm") == "model.norm"
    recording = record(model, [whole], [IDS, IDS + 1])
    assert torch.equal(recording.hidden[1], IDS + 1) and recording.calls[0][0].keyword == "input_ids"
    with torch.no_grad():
        assert torch.equal(replay(whole.module, IDS, recording.calls[0][0]), model.model(IDS).last_hidden_state)


def test_a_decoder_that_is_only_a_linear_layer_is_none():
    """What ``get_decoder`` of a model with a head for masked words gives."""
    model = next(a for a in MATRIX if a.kind == "modernbert").build()
    assert isinstance(model.get_decoder(), nn.Linear)
    assert [block.name for block in find_blocks(model)] == ["model.layers.0", "model.layers.1"]


def test_a_language_model_with_an_encoder_and_a_decoder_has_two_stacks():
    text = next(a for a in MATRIX if a.kind == "bart").build().model

    class Florence(nn.Module):
        config = text.config

        def __init__(self):
            super().__init__()
            self.language_model = text

        def get_encoder(self):
            return self.language_model

        get_decoder = get_encoder

    names = [[block.name.split(".")[1] for block in stack] for stack in find_stacks(Florence())]
    assert names == [["encoder"] * 2, ["decoder"] * 2]


def test_what_a_checkpoint_must_have():
    assert stored_parts(tiny_model("llama")) == ["model.layers."]
    loop = next(a for a in MATRIX if a.kind == "hrm_text").build()
    assert stored_parts(loop) == ["model.L_module.layers.", "model.H_module.layers."]
    experts = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})])
    assert stored_parts(nn.ModuleDict({"layers": experts})) == ["layers."]
