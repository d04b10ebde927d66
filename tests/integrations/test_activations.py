"""Weight-activation models: what is learned is what runs, also after saving and loading."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, GenerationConfig

import hf_spqr
from hf_spqr.nn import AffineLinear
from tests.architectures.matrix import calibration_ids
from tests.architectures.rows import ARCHITECTURES
from tests.tiny_models import tiny_model


def quantized(kind: str, name: str = "W8A8", **fields: object) -> torch.nn.Module:
    model = tiny_model(kind)
    torch.manual_seed(0)
    data = [torch.randint(1, 250, (24,)).tolist() for _ in range(6)]
    config = hf_spqr.OmniQuantConfig.from_preset(
        name, dataset=data, nsamples=6, seqlen=24, epochs=1, batch_size=3, **fields
    )
    hf_spqr.quantize_model(model, config, progress=False)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(1, 250, (2, 20), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_scheme_survives_saving(kind: str, tmp_path: Path) -> None:
    reference = logits(tiny_model(kind))
    model = quantized(kind)
    layers = [module for module in model.modules() if isinstance(module, AffineLinear)]
    assert layers and all(layer.act_bits == 8 for layer in layers)
    before = logits(model)
    assert 0 < (before - reference).norm() < 0.2 * reference.norm()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), before)
    for module in loaded.modules():
        if isinstance(module, AffineLinear):
            assert module.act_bits == 8
            module.act_bits = None
    assert not torch.equal(logits(loaded), before)


def test_attention_quantizes_its_operands(tmp_path: Path) -> None:
    model = quantized("llama", "W4A4")
    assert model.config._attn_implementation == "hf_spqr_a4"
    model.save_pretrained(tmp_path)
    with_attention = logits(model)
    with pytest.warns(UserWarning, match="'eager' is not used"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(loaded), with_attention)
    with pytest.warns(UserWarning, match="'sdpa' is not used"):
        loaded.set_attn_implementation("sdpa")
    assert torch.equal(logits(loaded), with_attention)
    with pytest.raises(ValueError, match="not supported"):
        loaded.set_attn_implementation("nonsense")
    plain = loaded.dequantize()
    assert plain.config._attn_implementation == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.set_attn_implementation("eager")
    assert plain.config._attn_implementation == "eager"


def test_continuous_batching_is_refused() -> None:
    """It knows its own attention functions; on a GPU it asks for another one, and finds this one kept."""
    model = quantized("llama", "W4A4")
    with pytest.raises(ValueError, match="hf_spqr_a4"):
        model.generate_batch([[1, 2, 3]], generation_config=GenerationConfig(max_new_tokens=2))
    states, attention = torch.zeros(1, 4, 3, 16), model.model.layers[0].self_attn
    with pytest.raises(hf_spqr.UnsupportedLayerError, match="Continuous batching"):
        AttentionInterface()["hf_spqr_a4"](attention, states, states, states, None, cache=object())


def test_only_calibrated_attention_is_quantized(tmp_path: Path) -> None:
    """The vision tower of a vision-language model has neither packed layers nor seen calibration data."""
    model = next(one for one in ARCHITECTURES if one.kind == "llava").build()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = model.model.vision_tower(image).last_hidden_state
    config = hf_spqr.OmniQuantConfig.from_preset("W4A4", dataset=calibration_ids(), nsamples=2, seqlen=32, epochs=0)
    hf_spqr.quantize_model(model, config, progress=False)
    model.save_pretrained(tmp_path)
    for one in (model, type(model).from_pretrained(tmp_path)):
        assert one.config.text_config._attn_implementation == "hf_spqr_a4"
        with torch.no_grad():
            assert torch.equal(one.model.vision_tower(image).last_hidden_state, seen)
        one.set_attn_implementation({"vision_config": "eager"})
        assert one.config.vision_config._attn_implementation == "eager"
        assert one.config.text_config._attn_implementation == "hf_spqr_a4"


def test_symmetric_activations_stay_symmetric(tmp_path: Path) -> None:
    model = quantized("llama", "W8A8", act_sym=True)
    assert model.config._attn_implementation == "hf_spqr_a8_sym"
    before = logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "hf_spqr_a8_sym"
    assert torch.equal(logits(loaded), before)
    for module in loaded.modules():
        if isinstance(module, AffineLinear):
            assert module.act_sym
            module.act_sym = False
    assert not torch.equal(logits(loaded), before)
    assert loaded.dequantize().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["gemma2", "falcon"], ids=["soft cap", "outside of the attention interface"])
def test_attention_that_cannot_be_replaced_is_not_quantized(kind: str) -> None:
    model = quantized(kind)
    assert model.config._attn_implementation == tiny_model(kind).config._attn_implementation
    assert model.config.quantization_config.params().quantize_attention is False
    assert any("q, k and v stay" in note for note in model.quantization_report.notes)


def test_weight_only_models_are_left_as_they_are() -> None:
    model = quantized("llama", "W4A16g32")
    assert model.config._attn_implementation == "sdpa"
    assert all(m.act_bits is None for m in model.modules() if isinstance(m, AffineLinear))
