"""The models that benchmarks/generate_cuda.py times, small and on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from generate_models import Decoder, build, linear_bytes, llama, packed_modules, read_per_token

from hf_spqr.nn import PackedLinear


@pytest.fixture
def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, dtype="bfloat16",
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "modules"), [("bf16", 0), ("spqr", 14), ("affine", 14)])
def test_decodes_as_without_a_cache(config: LlamaConfig, kind: str, modules: int) -> None:
    torch.manual_seed(0)
    model = build(config, kind, "cpu")
    assert packed_modules(model) == modules
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.check()
            assert 0.2 < module.dequantize_weight(torch.float32).std() * module.in_features**0.5 < 5
    decoder = Decoder(model, 16, "cpu")
    tokens, logits = [decoder.token.clone()], []
    for _ in range(4):
        logits.append(decoder.step())
        tokens.append(decoder.token.clone())
    assert decoder.position.item() == 4
    with torch.no_grad():
        whole = model(input_ids=torch.cat(tokens[:-1], 1), use_cache=False).logits
    found = torch.cat(logits, 1)
    assert found.isfinite().all() and found.std() > 0.1
    torch.testing.assert_close(found, whole, atol=0.06, rtol=0.06)


def test_bytes(config: LlamaConfig) -> None:
    model = build(config, "bf16", "cpu")
    norms, head = 2 * 256 * 5, 2 * 64 * 256
    assert read_per_token(model) == 2 * linear_bytes(config) + norms + head


def test_shapes() -> None:
    assert llama("7b").num_hidden_layers * linear_bytes(llama("7b")) == 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert llama("70b", 8).num_hidden_layers == 8


def test_unknown_kind(config: LlamaConfig) -> None:
    with pytest.raises(ValueError, match="bf16, spqr, affine"):
        build(config, "int8", "cpu")
