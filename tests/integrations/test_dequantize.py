"""``model.dequantize()``: ordinary layers again, in the dtype that is asked for, or nothing is changed."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_spqr import ConfigError, UnsupportedLayerError
from tests.integrations.conftest import assert_same, logits, packed_layers

load = AutoModelForCausalLM.from_pretrained


def test_dequantize(folder, quantized, tmp_path):
    model = load(folder).dequantize()
    assert not packed_layers(model) and not model.is_quantized
    torch.testing.assert_close(logits(model), logits(quantized), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, torch.float32])
def test_dequantize_to_a_dtype_casts_all_of_the_model(folder, dtype):
    model = load(folder, dtype=torch.float32).dequantize(dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert logits(model).dtype == wanted


def test_dequantize_after_a_cast_keeps_its_dtype(folder):
    model = load(folder).to(torch.bfloat16).dequantize()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_dequantize_to_no_float_changes_nothing(folder, quantized):
    model = load(folder)
    for dtype in (torch.float64, "int8", "nonsense"):
        with pytest.raises(ConfigError, match="float32, bfloat16 or float16"):
            model.dequantize(dtype=dtype)
    assert_same(quantized, model)


def test_a_dequantized_model_can_be_trained(folder):
    model = load(folder).dequantize()
    assert all(p.requires_grad for p in model.parameters())


def test_offloaded_models_are_not_dequantized_by_halves(folder, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(folder, device_map=device_map, offload_folder=tmp_path)
    with pytest.raises(UnsupportedLayerError, match="load the model without offload"):
        model.dequantize()
    assert len(packed_layers(model)) == 14
