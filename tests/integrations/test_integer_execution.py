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
from hf_spqr.nn import AffineLinear
from hf_spqr.ops.activation import token_grid

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
    half = 2 ** (layer.act_bits - 1)
    low, high = (1 - half, half - 1) if layer.act_sym else (0, 2 * half - 1)
    steps = ((x.float() / scale).round() + zero).clamp(low, high) - zero
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
