"""Models that are no plain decoder, through ``from_pretrained``: vision and language, encoder-decoder, GPT-2."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    ViTForImageClassification,
    Wav2Vec2ForCTC,
)
from transformers.pytorch_utils import Conv1D

from hf_spqr.errors import UnsupportedLayerError
from hf_spqr.integrations.transformers import quantize_model
from hf_spqr.nn import PackedLinear
from tests.architectures.matrix import IDS, METHODS, assert_same, distance, logits
from tests.architectures.rows import ARCHITECTURES
from tests.tiny_models import tiny_model


def built(kind: str) -> PreTrainedModel:
    return next(architecture for architecture in ARCHITECTURES if architecture.kind == kind).build()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2_vl"])
def test_the_vision_part_stays_as_it_is(kind, method, tmp_path):
    base = built(kind)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", quantization_config=METHODS[method]())
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == 14 and all(".language_model." in name for name in packed)
    before = base.state_dict()
    vision = {n: t for n, t in model.state_dict().items() if "vision" in n or "visual" in n or "projector" in n}
    assert vision and all(torch.equal(tensor, before[name]) for name, tensor in vision.items())
    model.save_pretrained(tmp_path / "q")
    assert_same(AutoModelForImageTextToText.from_pretrained(tmp_path / "q"), model)


@pytest.mark.parametrize("method", METHODS)
def test_images_still_run(method, tmp_path):
    model = built("llava")
    pixels = torch.randn(1, 3, 32, 32)
    ids = torch.tensor([[1, *[255] * 4, 5, 6, 7]])
    with torch.no_grad():
        before = model(input_ids=ids, pixel_values=pixels).logits
        model.save_pretrained(tmp_path)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=METHODS[method]())
        after = model(input_ids=ids, pixel_values=pixels).logits
    assert 0 < distance(after, before) < 0.4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_layers_that_a_model_keeps_in_float32(method, dtype, kept, tmp_path):
    """T5 wants ``wo`` in float32 where the model is float16; the layer is never packed."""
    built("t5").to(dtype).save_pretrained(tmp_path / "base")
    load = AutoModelForSeq2SeqLM.from_pretrained
    model = load(tmp_path / "base", quantization_config=METHODS[method](), dtype=dtype)
    wo = model.decoder.block[1].layer[2].DenseReluDense.wo
    assert type(wo) is nn.Linear and wo.weight.dtype == kept
    assert model.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == dtype
    assert all(bool(torch.isfinite(tensor).all()) for tensor in [logits(model)])
    model.save_pretrained(tmp_path / "q")
    again = load(tmp_path / "q", dtype=dtype)
    assert again.decoder.block[1].layer[2].DenseReluDense.wo.weight.dtype == kept
    assert_same(again, model)


def test_both_stacks_are_calibrated_on_the_quantized_encoder():
    model = built("t5")
    report = quantize_model(model, METHODS["SpQR"](), progress=False)
    names = [layer.name for layer in report.layers]
    assert sum(name.startswith("encoder.") for name in names) == 12
    assert sum("EncDecAttention" in name for name in names) == 8
    assert all(layer.error < 0.2 for layer in report.layers)


@pytest.mark.parametrize("method", METHODS)
def test_conv1d_on_the_fly(method, tmp_path):
    base = tiny_model("gpt2")
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=METHODS[method]())
    attention = model.transformer.h[0].attn.c_attn
    assert isinstance(attention, PackedLinear) and (attention.out_features, attention.in_features) == (192, 64)
    assert distance(logits(model), logits(base)) < 0.2
    model.save_pretrained(tmp_path / "q")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert_same(again, model)
    headless = AutoModel.from_pretrained(tmp_path / "q")
    assert isinstance(headless.h[1].mlp.c_fc, PackedLinear)
    again.dequantize()
    assert type(again.transformer.h[0].attn.c_attn) is Conv1D
    again.save_pretrained(tmp_path / "plain")
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items()}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (64, 192)


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_text_encoders(kind, method, tmp_path):
    """What sentence-transformers loads: no head, no causal mask."""
    torch.manual_seed(0)
    more = {"vocab_size": 258, **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)}
    base = AutoModel.from_config(AutoConfig.for_model(kind, pad_token_id=0, **SMALL, **more)).eval()
    base.save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base", quantization_config=METHODS[method]())
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == {"bert": 12, "modernbert": 8}[kind]
    model.save_pretrained(tmp_path / "q")
    again = AutoModel.from_pretrained(tmp_path / "q")
    with torch.no_grad():
        before, quantized, reloaded = (one(IDS).last_hidden_state for one in (base, model, again))
    assert 0 < distance(quantized, before) < 0.05
    assert torch.equal(reloaded, quantized)


@pytest.mark.parametrize(
    ("kind", "cls", "reads"),
    [
        ("vit", ViTForImageClassification, "pixel_values"),
        ("wav2vec2", Wav2Vec2ForCTC, "input_values"),
    ],
)
def test_models_that_read_no_text_are_refused(kind, cls, reads):
    config = AutoConfig.for_model(kind, **({} if kind == "clip" else SMALL))
    if kind == "clip":
        for part in (config.text_config, config.vision_config):
            part.update(SMALL)
    model = cls.from_config(config) if cls is AutoModel else cls(config)
    with pytest.raises(UnsupportedLayerError, match=f"reads {reads}: models are calibrated on text"):
        quantize_model(model, METHODS["SpQR"](), progress=False)
