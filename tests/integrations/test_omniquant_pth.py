"""OmniQuant's ``.pth`` files applied to a base model."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_spqr
from hf_spqr.integrations.omniquant_pth import apply_parameters, read_parameters
from hf_spqr.methods.omniquant.published import clipped_weight
from hf_spqr.nn import AffineLinear
from tests.tiny_models import tiny_model

IDS = torch.arange(40)[None] * 5 % 258


def make_file(path, model, group_size=32, transforms=False):
    gen = torch.Generator().manual_seed(0)
    blocks = {}
    for index, layer in enumerate(model.model.layers):
        stored = {}
        for name, linear in layer.named_modules():
            if isinstance(linear, nn.Linear):
                count = linear.weight.numel() // (linear.in_features if group_size < 0 else group_size)
                for side in ("upbound", "lowbound"):
                    stored[f"{name}.weight_quantizer.{side}_factor"] = 4 + torch.randn(count, 1, generator=gen)
        if transforms:
            for name in ("qkv", "out", "fc1"):
                stored[f"{name}_smooth_scale"] = torch.rand(64, generator=gen) + 0.5
        blocks[index] = {name: tensor.half() for name, tensor in stored.items()}
    torch.save(blocks, path)
    return blocks


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("group_size", [32, -1])
def test_clipping_only(tmp_path, group_size):
    model, base = tiny_model("llama", torch.float32), tiny_model("llama", torch.float32)
    blocks = make_file(tmp_path / "x.pth", model, group_size)
    report = apply_parameters(model, read_parameters(tmp_path / "x.pth"), bits=4, group_size=group_size)
    assert len(report.layers) == 14 and report.bits_per_weight < 7
    name = "mlp.down_proj"
    factors = tuple(blocks[1][f"{name}.weight_quantizer.{side}_factor"].float() for side in ("upbound", "lowbound"))
    expected, _ = clipped_weight(base.model.layers[1].mlp.down_proj.weight.detach(), 4, group_size, factors)
    assert torch.equal(model.model.layers[1].mlp.down_proj.dequantize_weight(), expected.dequantize())
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))


def test_with_transforms(tmp_path):
    model = tiny_model("llama", torch.float32, num_key_value_heads=4)
    before = logits(model)
    make_file(tmp_path / "x.pth", model, transforms=True)
    apply_parameters(model, read_parameters(tmp_path / "x.pth"), bits=8, group_size=32)
    assert isinstance(model.model.layers[0].self_attn.o_proj, AffineLinear)
    assert (logits(model) - before).abs().max() < 0.2 * before.abs().max()  # 8 bit, clipped by 2 %


def test_activations_are_quantized_where_the_scheme_says_so(tmp_path):
    model = tiny_model("llama", torch.float32, num_key_value_heads=4)
    make_file(tmp_path / "w4a4.pth", model, -1, transforms=True)
    apply_parameters(model, read_parameters(tmp_path / "w4a4.pth"), bits=4, group_size=-1, act_bits=4)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.model.layers[0].mlp.up_proj.act_bits == 4
    assert torch.equal(logits(again), logits(model))
    plain = tiny_model("llama", torch.float32, num_key_value_heads=4)
    apply_parameters(plain, read_parameters(tmp_path / "w4a4.pth"), bits=4, group_size=-1)
    assert (logits(plain) - logits(model)).abs().max() > 1e-2


def test_what_does_not_fit_is_refused(tmp_path):
    model = tiny_model("llama", torch.float32)
    make_file(tmp_path / "x.pth", model)
    found = read_parameters(tmp_path / "x.pth")
    with pytest.raises(hf_spqr.CheckpointError, match="blocks"):
        apply_parameters(model, {0: found[0]}, bits=4)
    with pytest.raises(hf_spqr.CheckpointError, match=r"q_proj: The file has \d+ clipping factors"):
        apply_parameters(model, found, bits=4, group_size=64)
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name, message in (("text.pth", "no file of"), ("other.pth", "no file of"), ("none.pth", "does not exist")):
        with pytest.raises(hf_spqr.CheckpointError, match=message):
            read_parameters(tmp_path / name)
