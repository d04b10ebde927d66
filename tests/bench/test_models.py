"""Estimates for whole models against arithmetic done here, and the shapes against transformers' own models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_spqr.bench.models import COMMON, ModelShape, Speed, estimate


@pytest.mark.parametrize("shape", COMMON, ids=lambda shape: shape.name)
def test_shapes_count_what_transformers_builds(shape: ModelShape) -> None:
    head = 128
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.attention // head, num_key_value_heads=shape.key_value // head, head_dim=head,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linear = [m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert shape.linear_weights == sum(linear)
    norms = (2 * shape.layers + 1) * shape.hidden
    assert shape.weight_bytes(16) == 2 * (sum(p.numel() for p in model.parameters()) - norms)


def test_names_say_the_size() -> None:
    for shape in COMMON:
        billions = (shape.linear_weights + shape.head_weights * (1 if shape.tied else 2)) / 1e9
        assert billions == pytest.approx(float(shape.name[:-1]), rel=0.25)


def test_estimate() -> None:
    shape = ModelShape("tiny", 10, 20, 3, 10, 5, 100, False)
    dense = Speed("dense", 16, 1000)
    weights, head = 3 * (300 + 600), 1000
    assert (shape.linear_weights, shape.head_weights) == (weights, head)
    found = estimate([shape], [dense, Speed("packed", 4, 500)], dense, 0.5, 6000)
    assert [one.kind for one in found] == ["dense", "packed"]
    assert found[0].tokens_per_second == pytest.approx(1 / (2 * weights / 1000 + 2 * head / 1000 + 1.5))
    assert found[1].tokens_per_second == pytest.approx(1 / (weights / 2 / 500 + 2 * head / 1000 + 1.5))
    assert [one.weight_bytes for one in found] == [2 * weights + 4 * head, weights / 2 + 4 * head]
    assert [one.fits for one in found] == [False, True]
