"""Greedy tokens of the demo model on integers beside fake quantization in floating point, evaluated in three ways.

    python benchmarks/integer_tokens.py

Sixteen held-out prompts, 200 tokens each, the model as it is stored (bfloat16), layers rounded to nearest:

- exact: steps of activations times steps of weights in float64, where the sum is exact, then the scales in float32, in
  the order of the integer layer;
- float32 and float64: activations and weights with their scales, as fake quantization is usually written, summed in
  that type.

A pair of them agrees on a prompt when all 200 tokens are equal. Writes benchmarks/results/integer_tokens.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from machine import save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_spqr
from hf_spqr.formats import affine
from hf_spqr.formats.tokens import code_range, token_grid
from hf_spqr.nn import AffineLinear

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PRESETS = ("W8A8", "W6A6", "W4A8", "W4A4")
PROMPTS, PROMPT_TOKENS, TOKENS = 16, 48, 200
Forward = Callable[[AffineLinear, Tensor], Tensor]


def texts(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


def steps_of(layer: AffineLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    scale, zero = token_grid(x, layer.act_bits, layer.act_sym)
    return ((x.float() / scale).round() + zero).clamp(*code_range(layer.act_bits, layer.act_sym)) - zero, scale


def float_forwards(layers: list[AffineLinear]) -> dict[str, Forward]:
    weights = {layer: affine.unpack(layer.layout, layer.packed_tensors()) for layer in layers}
    steps = {layer: w.codes.double() - w.zeros.double() for layer, w in weights.items()}
    dense = {
        dtype: {layer: w.dequantize().to(dtype) for layer, w in weights.items()}
        for dtype in (torch.float32, torch.float64)
    }

    def exact(layer: AffineLinear, x: Tensor) -> Tensor:
        codes, scale = steps_of(layer, x)
        return ((codes.double() @ steps[layer].T).float() * (scale * weights[layer].scales.float().T)).to(x.dtype)

    def usual(dtype: torch.dtype) -> Forward:
        def forward(layer: AffineLinear, x: Tensor) -> Tensor:
            codes, scale = steps_of(layer, x)
            return torch.nn.functional.linear(codes.to(dtype) * scale.to(dtype), dense[dtype][layer]).to(x.dtype)

        return forward

    return {"exact": exact, "float32": usual(torch.float32), "float64": usual(torch.float64)}


def tokens_of(model: Any, prompts: Tensor, forward: Forward | None) -> Tensor:
    usual = AffineLinear.forward
    AffineLinear.forward = forward or usual
    try:
        shape = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        found = model.generate(prompts, attention_mask=torch.ones_like(prompts), **shape)
    finally:
        AffineLinear.forward = usual
    return found[:, prompts.shape[1] :]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo-model")
    encoded = [tokenizer(text)["input_ids"] for text in texts("demo-heldout.jsonl")]
    prompts = torch.tensor([ids[:PROMPT_TOKENS] for ids in encoded if len(ids) >= PROMPT_TOKENS][:PROMPTS])
    rows = []
    for name in PRESETS:
        config = hf_spqr.OmniQuantConfig.from_preset(
            name, dataset=texts("demo-calibration.jsonl"), nsamples=8, seqlen=128, epochs=0
        )
        model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "demo-model")
        hf_spqr.quantize_model(model, config, tokenizer=tokenizer, progress=False)
        layers = [module for module in model.modules() if isinstance(module, AffineLinear)]
        found = {"integers": tokens_of(model, prompts, None)}
        for kind, forward in float_forwards(layers).items():
            found[kind] = tokens_of(model, prompts, forward)
        for one, other in combinations(found, 2):
            same = (found[one] == found[other]).int().cumprod(1).sum(1)
            agree = int((same == TOKENS).sum())
            rows.append(
                {"preset": name, "pair": [one, other], "prompts": PROMPTS, "agree": agree, "same": same.tolist()}
            )
            print(
                f"{name} {one:9s} {other:9s} {agree:3d} of {PROMPTS}, tokens until they part: {sorted(same.tolist())}"
            )
    print("wrote", save("integer_tokens", {"tokens": TOKENS, "rows": rows}))


if __name__ == "__main__":
    main()
