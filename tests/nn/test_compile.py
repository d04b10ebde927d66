"""A decoding step over a static cache compiles as a whole on the CPU, once, and gives what the eager one gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from hf_spqr.bench import weights
from hf_spqr.nn import AffineLinear

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
STEPS = 6


def spqr(rows: int, columns: int) -> nn.Module:
    return weights.spqr_linear(rows, columns)


def affine(rows: int, columns: int) -> nn.Module:
    return weights.affine_linear(rows, columns)


def affine_w8a8(rows: int, columns: int) -> AffineLinear:
    layer = weights.affine_linear(rows, columns, bits=8, group_size=-1)
    layer.act_bits = 8
    return layer


def decode(forward: Callable[..., Any], tokens: Tensor) -> list[Tensor]:
    """Logits of each step."""
    cache = StaticCache(config=CONFIG, max_cache_len=16)
    found = []
    for at in range(STEPS):
        position = torch.tensor([[at]])
        mask = (torch.arange(16) <= position)[None, None]
        with torch._dynamo.config.patch(error_on_recompile=at > 1):  # the first step also sets up the cache
            found.append(forward(tokens[:, at : at + 1], mask, position, cache, use_cache=True).logits)
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("layer", [spqr, affine, affine_w8a8])
def test_the_decoding_step_compiles(layer: Callable[[int, int], nn.Module]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model: Any = LlamaForCausalLM(CONFIG).eval().requires_grad_(False)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, layer(module.out_features, module.in_features))
    tokens = torch.randint(64, (1, STEPS))
    with torch.no_grad():
        eager = decode(model, tokens)
        compiled = decode(torch.compile(model.forward, fullgraph=True), tokens)
    assert torch.cat(eager).std() > 0.01
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
