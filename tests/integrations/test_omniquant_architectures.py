"""OmniQuant on twelve architectures, from the model to the file and back, against fake quantization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hf_spqr
from hf_spqr.formats.tokens import fake_quantize_activation
from hf_spqr.integrations.activations import attention_name
from hf_spqr.nn import AffineLinear
from tests.tiny_models import ARCHITECTURES, tiny_model

# Equivalent transforms of a block, counted by hand: two norms, v -> o, up -> down and q against k. A GELU between up
# and down allows none there (gpt_neox, falcon); blocks whose attention and MLP stand side by side share a norm
# (falcon, cohere2; gpt_neox has two); olmo2 normalizes after its layers.
TRANSFORMS = dict.fromkeys(ARCHITECTURES, 5) | {"gpt_neox": 4, "falcon": 3, "cohere2": 4, "olmo2": 3}
# Relative distance of the logits. Weight-only: some kernels take float32 inputs as two bfloat16, about 16 bits. With
# activations: where a sum falls between two of 255 steps by its last bit, it may be rounded to either.
TOLERANCE = {"W4A16g32": 5e-4, "W8A8": 1e-2}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(1, 250, (2, 20), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, use_cache=False).logits


def fake_quantized(folder: Path) -> nn.Module:
    """The model of ``folder`` with ordinary layers, whose weights, inputs and attention lie on the quantized grids."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config.quantization_config
    packed = [name for name, module in model.named_modules() if isinstance(module, AffineLinear)]
    model = model.dequantize()
    if config.act_bits is None:
        return model
    for name in packed:
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        layer.register_forward_pre_hook(lambda module, args: (fake_quantize_activation(args[0], config.act_bits),))
    if config.params().quantize_attention:
        model.set_attn_implementation(attention_name(config.act_bits, False))
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("preset", TOLERANCE)
def test_from_the_model_to_the_file_and_back(kind: str, preset: str, tmp_path: Path) -> None:
    before = logits(tiny_model(kind))
    model = tiny_model(kind)
    torch.manual_seed(0)
    data = [torch.randint(1, 250, (24,)).tolist() for _ in range(6)]
    config = hf_spqr.OmniQuantConfig.from_preset(
        preset, let=True, dataset=data, nsamples=6, seqlen=24, epochs=1, batch_size=3
    )
    report = hf_spqr.quantize_model(model, config, progress=False)
    assert [len(block.transforms) for block in report.blocks] == [TRANSFORMS[kind]] * 2
    assert all(block.final <= block.initial and block.skipped == 0 for block in report.blocks)
    quantized = logits(model)
    assert 0 < (quantized - before).norm() < 0.3 * before.norm()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    layers = [module for module in loaded.modules() if isinstance(module, AffineLinear)]
    assert len(layers) == len(report.layers) and {layer.act_bits for layer in layers} == {config.act_bits}
    assert torch.equal(logits(loaded), quantized)
    assert (logits(fake_quantized(tmp_path)) - quantized).norm() < TOLERANCE[preset] * quantized.norm()
    if config.act_bits is not None:  # the tolerance would not hide layers that leave their inputs alone
        for layer in layers:
            layer.act_bits = None
        assert not torch.equal(logits(loaded), quantized)
