"""OmniQuant through Transformers' API: quantize, save, reload, exactly; it differs from SpQR only in its modules."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_spqr
from hf_spqr.errors import CheckpointError
from hf_spqr.integrations.transformers import attach
from hf_spqr.nn import AffineLinear
from hf_spqr.report.checkpoint import inspect_checkpoint
from tests.integrations.conftest import IDS
from tests.integrations.test_export import affine_model
from tests.tiny_models import ARCHITECTURES

load = AutoModelForCausalLM.from_pretrained


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_round_trip(kind, model_dir, texts, tmp_path):
    config = hf_spqr.OmniQuantConfig(
        bits=4, group_size=32, let=True, epochs=1, nsamples=4, seqlen=32, dataset=texts, scale_dtype="bfloat16"
    )
    model = load(model_dir(kind, torch.bfloat16), quantization_config=config)
    assert model.dtype == torch.bfloat16 and model.quantization_method == "omniquant"
    model.save_pretrained(tmp_path / "q", max_shard_size="50KB")
    again = load(tmp_path / "q")
    assert sum(isinstance(m, AffineLinear) for m in again.modules()) == len(model.quantization_report.layers)
    assert again.config.quantization_config == model.config.quantization_config
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("act_bits", [None, 8])
def test_mixed_widths(act_bits, model_dir, texts, tmp_path):
    group_size = 32 if act_bits is None else -1
    config = hf_spqr.OmniQuantConfig(
        bits=3, group_size=group_size, act_bits=act_bits, epochs=1, nsamples=4, seqlen=32, dataset=texts,
        overrides={r"layers\.1\.mlp": {"bits": 8, "group_size": -1}, "model.layers.0.self_attn.o_proj": {"sym": True}},
    )  # fmt: skip
    model = load(model_dir("llama"), quantization_config=config)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    layouts = {name: m.layout for name, m in again.named_modules() if isinstance(m, AffineLinear)}
    assert {name for name, layout in layouts.items() if layout.bits == 8} == {
        f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")
    }
    assert [name for name, lay in layouts.items() if lay.symmetric] == ["model.layers.0.self_attn.o_proj"]
    assert all(m.act_bits == act_bits for m in again.modules() if isinstance(m, AffineLinear))
    assert torch.equal(logits(model), logits(again))
    shown = inspect_checkpoint(tmp_path)
    assert {layer.name: (layer.bits, layer.group_size) for layer in shown.layers} == {
        name: (layout.bits, layout.group_size) for name, layout in layouts.items()
    }


def test_zero_points_of_a_damaged_file_are_refused(tmp_path):
    model = affine_model(4, -1)
    attach(model, hf_spqr.OmniQuantConfig(bits=4, group_size=-1))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.packed"][0, 5] |= 1 << 24
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj: damaged packed layer: a zero point"):
        load(tmp_path)


def test_preset_tied_and_dequantized(model_dir, texts, tmp_path):
    config = hf_spqr.OmniQuantConfig.from_preset("W3A16g64", epochs=1, nsamples=4, seqlen=32, dataset=texts)
    model = load(model_dir("llama", tie_word_embeddings=True), quantization_config=config)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(logits(again.dequantize()), logits(model), rtol=1e-3, atol=1e-3)
