"""A weight-activation model runs on integers, and says what fake quantization in floating point says."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_spqr
from hf_spqr import ops
from hf_spqr.formats import affine
from hf_spqr.formats.tokens import code_range, token_grid
from hf_spqr.nn import AffineLinear
from tests.tiny_models import tiny_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOKENS = 200


def texts(name: str, count: int) -> list[str]:
    with (EXAMPLES / name).open(encoding="utf-8") as file:
        return [json.loads(next(file))["text"] for _ in range(count)]


def fake_quantized(layer: AffineLinear, x: Tensor) -> Tensor:
    """The layer in floating point: both operands on their grids, the sum in float64, where it is exact.

    The scales come after the sum, as in the integer layer: with a scale inside, every float sum is rounded somewhere,
    and the next layer's rounding makes a whole step of that now and then.
    """
    scale, zero = token_grid(x, layer.act_bits, layer.act_sym)
    steps = ((x.float() / scale).round() + zero).clamp(*code_range(layer.act_bits, layer.act_sym)) - zero
    weight, weight_scale = grid_of_weight(layer)
    return ((steps.double() @ weight.T).float() * (scale * weight_scale)).to(x.dtype)


@cache
def grid_of_weight(layer: AffineLinear) -> tuple[Tensor, Tensor]:
    """Steps float64 [N, K] and scales float32 [1, N]."""
    weight = affine.unpack(layer.layout, layer.packed_tensors())
    middle = layer.layout.middle if weight.zeros is None else weight.zeros.double()
    return weight.codes.double() - middle, weight.scales.float().T


@pytest.mark.parametrize("name", ["W8A8", "W6A6", "W4A8", "W4A4"])
def test_two_hundred_tokens_of_the_demo_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo-model")
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "demo-model")
    data = texts("demo-calibration.jsonl", 16)
    config = hf_spqr.OmniQuantConfig.from_preset(name, dataset=data, nsamples=4, seqlen=64, epochs=0)
    hf_spqr.quantize_model(model, config, tokenizer=tokenizer, progress=False)
    prompt = tokenizer(texts("demo-heldout.jsonl", 1)[0][:120], return_tensors="pt")["input_ids"]
    shape = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}

    called = []
    integer_linear = ops.integer_linear
    monkeypatch.setattr(ops, "integer_linear", lambda *a: called.append(1) or integer_linear(*a))
    integers = model.generate(prompt, **shape, output_logits=True, return_dict_in_generate=True)
    layers = [module for module in model.modules() if isinstance(module, AffineLinear)]
    assert len(called) == TOKENS * len(layers)
    monkeypatch.setattr(AffineLinear, "forward", fake_quantized)
    floats = model.generate(prompt, **shape, output_logits=True, return_dict_in_generate=True)
    assert integers.sequences.shape[1] == prompt.shape[1] + TOKENS
    assert torch.equal(integers.sequences, floats.sequences)
    assert all(torch.equal(a, b) for a, b in zip(integers.logits, floats.logits, strict=True))


def test_one_graph_for_a_step_of_decoding() -> None:
    model, ids = tiny_model("llama"), torch.arange(3, 13)[None]
    config = hf_spqr.OmniQuantConfig.from_preset(
        "W8A8", dataset=[ids[0].tolist()] * 2, nsamples=2, seqlen=10, epochs=0
    )
    hf_spqr.quantize_model(model, config, progress=False)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **greedy)
    graph = torch.export.export(Logits(model), (ids,))
    names = {str(node.target) for node in graph.graph.nodes}
    assert {"hf_spqr.quantize_activation.default", "hf_spqr.w_int8_linear.default"} <= names
    assert "hf_spqr.affine_linear.default" not in names
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(ids, cache_implementation="static", **greedy), expected)


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits
