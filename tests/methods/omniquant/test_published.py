"""The published transforms and clipping, against the formulas written out again for the test."""

import pytest
import torch

from hf_spqr.errors import CheckpointError
from hf_spqr.methods.omniquant.published import clipped_weight, clipping_of, fold_transforms
from tests.tiny_models import tiny_model

HIDDEN = 64


def transforms(shift=False, values=HIDDEN):
    gen = torch.Generator().manual_seed(0)
    stored = {}
    for name, size in (("qkv", HIDDEN), ("out", values), ("fc1", HIDDEN)):
        stored[f"{name}_smooth_scale"] = torch.rand(size, generator=gen) + 0.5
        stored[f"{name}_smooth_shift"] = 0.1 * torch.randn(size, generator=gen) if shift else torch.zeros(size)
    return {name: tensor.half() for name, tensor in stored.items()}


@pytest.mark.parametrize(("kind", "shift"), [("llama", False), ("opt", True)])
def test_folded_transforms_leave_the_function_as_it_is(kind, shift):
    model = tiny_model(kind, torch.float32, num_key_value_heads=4).double()
    ids = torch.arange(40)[None] * 5 % 258
    with torch.no_grad():
        before = model(ids).logits
        for layer in model.model.layers if kind == "llama" else model.model.decoder.layers:
            tensors = dict(layer.named_parameters())
            stored = transforms(shift)
            if kind == "opt":  # without rotary embeddings q and k may be scaled channel by channel, biases too
                stored["qkt_smooth_scale"] = 0.5 + torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1))
            changed = fold_transforms(tensors, stored)
            assert changed and set(changed) <= set(tensors)
            for name, value in changed.items():
                tensors[name].copy_(value)
        after = model(ids).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_query_and_key_rows_are_scaled_as_the_original_does():
    layer = tiny_model("llama", torch.float32, num_key_value_heads=4).model.layers[0]
    tensors = dict(layer.named_parameters())
    scale = torch.linspace(0.5, 2, HIDDEN)
    scale[3] = -0.001  # used as -0.01
    changed = fold_transforms(tensors, {"qkt_smooth_scale": scale})
    assert set(changed) == {"self_attn.q_proj.weight", "self_attn.k_proj.weight"}
    torch.testing.assert_close(changed["self_attn.k_proj.weight"][3], -0.01 * tensors["self_attn.k_proj.weight"][3])
    torch.testing.assert_close(changed["self_attn.q_proj.weight"][5], tensors["self_attn.q_proj.weight"][5] / scale[5])


def test_transforms_that_do_not_fit_are_refused():
    shared = dict(tiny_model("llama", torch.float32).model.layers[0].named_parameters())
    with pytest.raises(CheckpointError, match="shares them"):
        fold_transforms(shared, transforms())
    own = dict(tiny_model("llama", torch.float32, num_key_value_heads=4).model.layers[0].named_parameters())
    with pytest.raises(CheckpointError, match=r"no input_layernorm\.bias to take the shift"):
        fold_transforms(own, transforms(shift=True))
    neox = dict(tiny_model("gpt_neox", torch.float32).gpt_neox.layers[0].named_parameters())
    with pytest.raises(CheckpointError, match="Llama and OPT"):
        fold_transforms(neox, transforms())
    assert fold_transforms(neox, {"mlp.weight_quantizer.upbound_factor": torch.zeros(1)}) == {}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_clipping_is_the_published_formula(bits, group_size):
    torch.manual_seed(1)
    weight = torch.randn(8, 48)
    groups = 1 if group_size < 0 else 3
    up, low = torch.randn(8 * groups, 1), torch.randn(8 * groups, 1)
    packed, outside = clipped_weight(weight, bits, group_size, (up, low))
    assert outside == 0
    expected = torch.empty(8 * groups, 48 // groups, dtype=torch.float64)
    for i, group in enumerate(weight.double().reshape(8 * groups, -1)):
        top = 2**bits - 1
        high = group.max() / (1 + torch.exp(-up[i].double()))
        bottom = group.min() / (1 + torch.exp(-low[i].double()))
        scale = ((high - bottom) / top).clamp(1e-5, 1e4)
        zero = torch.round(-bottom / scale)
        expected[i] = (torch.clamp(torch.round(group / scale) + zero, 0, top) - zero) * scale
    got = packed.dequantize().double().reshape(8 * groups, -1)
    wrong = (got - expected).abs() > 1e-3  # a scale rounded to fp16 may move a value that lies between two codes
    assert wrong.float().mean() < 0.01


def test_groups_without_a_zero_are_widened():
    weight = torch.rand(4, 16) + 1
    packed, outside = clipped_weight(weight, 4, -1, None)
    assert outside == 4
    assert (packed.dequantize() - weight).abs().max() < 2 / 15


def test_factors_must_fit():
    with pytest.raises(CheckpointError, match="8 clipping factors for a layer with 4 groups"):
        clipped_weight(torch.randn(4, 16), 3, -1, (torch.zeros(8, 1), torch.zeros(8, 1)))
    with pytest.raises(CheckpointError, match="no multiple"):
        clipped_weight(torch.randn(4, 20), 3, 16, None)
    assert clipping_of({}, "mlp.up_proj") is None
