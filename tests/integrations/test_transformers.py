"""Quantize inside from_pretrained, save, reload, move, cast, compile, all through Transformers' API."""

import gc
import json
import warnings
import weakref

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_spqr import CheckpointError, ConfigError, SpQRConfig
from hf_spqr.nn import SpQRLinear
from tests.architectures.matrix import METHODS
from tests.architectures.rows import ARCHITECTURES as MATRIX
from tests.integrations.conftest import IDS, assert_same, logits, packed_layers, quantize_folder
from tests.tiny_models import ARCHITECTURES, byte_tokenizer

load = AutoModelForCausalLM.from_pretrained


# -- quantize and round trip


def test_quantized_on_the_fly(quantized):
    assert len(packed_layers(quantized)) == 14
    assert type(quantized.lm_head) is nn.Linear
    assert quantized.is_quantized and quantized.quantization_method == "hf_spqr"
    assert quantized.quantization_report.bits_per_weight > 3
    assert quantized.config.quantization_config.dataset is None
    assert not any(p.requires_grad for m in packed_layers(quantized).values() for p in m.parameters())


def test_users_config_keeps_its_data(base_folder, texts):
    config = SpQRConfig(dataset=texts, nsamples=2, seqlen=32)
    load(base_folder, quantization_config=config)
    assert config.dataset is texts


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_round_trip_is_exact(quantized, tmp_path, shard):
    quantized.save_pretrained(tmp_path, max_shard_size=shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "20KB")
    again, info = load(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(quantized, again)
    assert torch.equal(logits(quantized), logits(again))
    assert not any(p.requires_grad for m in packed_layers(again).values() for p in m.parameters())
    again.save_pretrained(tmp_path / "again")
    assert_same(quantized, load(tmp_path / "again"))


def test_files_say_what_they_are(folder):
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "hf_spqr" and stored["format_version"] == 1
    assert "dataset" not in stored and "shapes" not in stored
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata()["hf_spqr_format_version"] == "1"
        assert file.get_slice("model.layers.0.mlp.up_proj.weight").get_shape() == [0]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_round_trips(kind, model_dir, texts, tmp_path):
    model = quantize_folder(model_dir(kind, torch.bfloat16), texts, torch.bfloat16, nsamples=2, seqlen=32)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "q")
    again = load(tmp_path / "q")
    assert again.dtype == torch.bfloat16
    assert_same(model, again)
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_tied_embeddings(kind, model_dir, texts, tmp_path):
    model = quantize_folder(model_dir(kind, tie_word_embeddings=True), texts, nsamples=2, seqlen=32)
    model.save_pretrained(tmp_path / "q")
    with safe_open(tmp_path / "q" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()
    again = load(tmp_path / "q")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(again))


def test_mixture_of_experts_keeps_its_experts(model_dir, texts, tmp_path):
    """Excluded experts are left as they are, and are still saved one by one as in the original file."""
    base = model_dir("mixtral")
    model = quantize_folder(base, texts, nsamples=2, seqlen=32, modules_to_not_convert=["experts"])
    model.save_pretrained(tmp_path / "q")
    with safe_open(base / "model.safetensors", "pt") as file:
        experts = {name for name in file.keys() if "experts" in name}
    with safe_open(tmp_path / "q" / "model.safetensors", "pt") as file:
        assert experts and experts <= set(file.keys())
    again = load(tmp_path / "q")
    assert_same(model, again)
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("model.layers.1.mlp.up_proj", {"1.mlp.up_proj"}),
        ("o_proj", {"0.self_attn.o_proj", "1.self_attn.o_proj"}),
        (r"layers\.0\..*(gate|up)_proj$", {"0.mlp.gate_proj", "0.mlp.up_proj"}),
    ],
    ids=["name", "suffix", "regex"],
)
def test_modules_to_not_convert(base_folder, texts, tmp_path, pattern, left):
    model = quantize_folder(base_folder, texts, modules_to_not_convert=[pattern], nsamples=2, seqlen=32)
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    for found in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        blocks = dict(found.model.layers.named_modules())
        dense = {name for name, module in blocks.items() if type(module) is nn.Linear}
        assert dense == left
        assert all(torch.equal(blocks[name].weight, base.model.layers.get_submodule(name).weight) for name in left)
        assert sum(isinstance(module, SpQRLinear) for module in blocks.values()) == 14 - len(left)


def test_mixed_precision_is_read_from_the_file(base_folder, texts, tmp_path):
    overrides = {"mlp": {"bits": 4, "group_size": 32}, r"layers\.1\.self_attn": {"bits": 2}}
    model = quantize_folder(
        base_folder, texts, overrides=overrides, modules_to_not_convert=["layers.0.self_attn", "down_proj"]
    )
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same(model, again)
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert again.model.layers[1].self_attn.q_proj.layout.bits == 2
    assert again.model.layers[1].mlp.up_proj.layout.group_size == 32


def test_what_a_size_chose_is_stored_and_the_users_config_stays_open(base_folder, texts, tmp_path):
    config = SpQRConfig(target_bits=7, dataset=texts, nsamples=2, seqlen=32)
    model = load(base_folder, quantization_config=config)
    assert (config.bits, config.group_size) == (None, None)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same(model, again)
    stored = again.config.quantization_config
    assert {(m.layout.bits, m.layout.group_size) for m in packed_layers(again).values()} == {
        (stored.bits, stored.group_size)
    }
    assert stored.bits > 3


def test_quantize_in_place_then_save(base_folder, texts, tmp_path):
    import hf_spqr

    model = load(base_folder)
    hf_spqr.quantize_model(
        model, SpQRConfig(dataset=texts, nsamples=2, seqlen=32), tokenizer=byte_tokenizer(), progress=False
    )
    model.save_pretrained(tmp_path)
    assert_same(model, load(tmp_path))
    assert not packed_layers(model.dequantize())


# -- devices


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_device_maps(folder, quantized, device_map):
    model = load(folder, device_map=device_map)
    assert_same(quantized, model)
    assert torch.equal(logits(quantized), logits(model))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps_while_quantizing(base_folder, texts, quantized, device_map, tmp_path):
    config = SpQRConfig(bits=3, dataset=texts, nsamples=8, seqlen=64, act_order=True)
    model = load(base_folder, quantization_config=config, device_map=device_map)
    assert_same(quantized, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of offloaded weights
        model.save_pretrained(tmp_path)


def test_offload_to_disk(folder, quantized, tmp_path):
    device_map = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.up_proj.packed.is_meta
    assert torch.equal(logits(quantized), logits(model))
    arguments = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, **arguments), quantized.generate(IDS, **arguments))
    model.save_pretrained(tmp_path / "saved")
    assert_same(quantized, load(tmp_path / "saved"))


def test_a_model_without_data(folder):
    model = load(folder, device_map="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert isinstance(model.model.layers[1].mlp.up_proj, SpQRLinear)


def test_quantizing_with_disk_offload_is_refused(base_folder, texts):
    with pytest.raises(ConfigError, match="offloaded to disk"):
        config = SpQRConfig(dataset=texts)
        load(base_folder, quantization_config=config, device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device_map", ["cuda", "auto"])
def test_cuda(folder, base_folder, texts, quantized, device_map):
    model = load(folder, device_map=device_map)
    torch.testing.assert_close(logits(model).cpu(), logits(quantized), rtol=1e-3, atol=1e-3)
    config = SpQRConfig(bits=3, dataset=texts, nsamples=8, seqlen=64)
    model = load(base_folder, quantization_config=config, device_map=device_map)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert logits(model).isfinite().all()


# -- base model and heads


def test_base_model_under_a_head_and_back(folder, quantized, tmp_path):
    base = AutoModel.from_pretrained(folder)
    assert torch.equal(base.layers[0].mlp.up_proj.packed, quantized.model.layers[0].mlp.up_proj.packed)
    base.save_pretrained(tmp_path / "base")
    head, info = load(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert_same(base, head.model)
    other = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert len(packed_layers(other)) == 14


def test_overrides_with_full_names_survive_the_change(base_folder, texts, tmp_path):
    model = quantize_folder(base_folder, texts, overrides={r"^model\.layers\.0\.mlp": {"bits": 5}})
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert base.layers[0].mlp.up_proj.layout.bits == 5 and base.layers[1].mlp.up_proj.layout.bits == 3
    assert_same(model.model, base)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "t5"])
def test_fewer_blocks_than_the_file_has(kind, tmp_path):
    """As of any checkpoint the first ones are loaded, for example as a draft model."""
    from hf_spqr.integrations.transformers import quantize_model

    model = next(one for one in MATRIX if one.kind == kind).build()
    quantize_model(model, METHODS["SpQR"](), progress=False)
    model.save_pretrained(tmp_path)
    fewer = {"num_layers": 1, "num_decoder_layers": 1} if kind == "t5" else {"num_hidden_layers": 1}
    short, info = type(model).from_pretrained(tmp_path, output_loading_info=True, **fewer)
    assert not info["missing_keys"] and info["unexpected_keys"]
    first, whole = short.state_dict(), model.state_dict()
    assert 0 < len(first) < len(whole)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in first.items())
    with pytest.raises(CheckpointError, match=r"The checkpoint lacks .* of another model"):
        type(model).from_pretrained(tmp_path, **{key: 3 for key in fewer})


# -- dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_in_another_dtype(folder, quantized, dtype):
    model = load(folder, dtype=dtype)
    layer, original = model.model.layers[0].mlp.up_proj, quantized.model.layers[0].mlp.up_proj
    assert model.dtype == layer.weight.dtype == dtype
    assert torch.equal(layer.packed, original.packed) and torch.equal(layer.outlier, original.outlier)
    assert logits(model).dtype == dtype
    assert (
        torch.nn.functional.cosine_similarity(logits(model).flatten().float(), logits(quantized).flatten(), 0) > 0.99
    )


def test_casts_leave_packed_tensors_alone(folder, quantized):
    model = load(folder)
    model.to(torch.bfloat16)
    for name, layer in packed_layers(model).items():
        for key, tensor in layer.packed_tensors().items():
            assert torch.equal(tensor, quantized.get_submodule(name).packed_tensors()[key])
        assert layer.weight.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


# -- loading attributes, dequantize, compile


@pytest.mark.parametrize("backend", ["reference", "int8_activations"])
def test_loading_attributes(folder, quantized, tmp_path, backend):
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        model = load(folder, quantization_config=SpQRConfig(backend=backend, bits=8))
    config = model.config.quantization_config
    assert (config.backend, config.bits) == (backend, 3)
    assert {layer.backend for layer in packed_layers(model).values()} == {backend}
    near = 1e-4 if backend == "reference" else 0.02
    torch.testing.assert_close(logits(model), logits(quantized), rtol=near, atol=near)
    model.save_pretrained(tmp_path)
    assert "backend" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {layer.backend for layer in packed_layers(load(tmp_path)).values()} == {"auto"}


def test_config_of_a_loaded_model_can_be_passed_again(folder, quantized):
    model = load(folder)
    assert_same(quantized, load(folder, config=model.config))


def test_a_dtype_that_no_kernel_computes_in_is_refused_on_load(folder):
    with pytest.raises(ConfigError, match=r"dtype=.*float64: quantized models compute in float32, bfloat16 or"):
        load(folder, dtype=torch.float64)


@pytest.mark.slow
def test_compile_in_one_graph(folder, quantized):
    model = load(folder)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits, logits(quantized), rtol=1e-4, atol=1e-4)
    layer = torch.compile(model.model.layers[0].mlp.up_proj, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_generate_with_static_cache(folder, quantized):
    arguments = {"max_new_tokens": 4, "do_sample": False}
    model = load(folder)
    expected = quantized.generate(IDS, **arguments)
    assert torch.equal(model.generate(IDS, **arguments), expected)
    assert torch.equal(model.generate(IDS, cache_implementation="static", disable_compile=True, **arguments), expected)


def test_needs_calibration_data(base_folder):
    with pytest.raises(ConfigError, match="pass dataset="):
        load(base_folder, quantization_config=SpQRConfig())


def test_memory_is_free_when_the_model_is_deleted(folder):
    model = load(folder)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_memory_footprint(folder, base_folder):
    model, base = load(folder), load(base_folder)
    blocks = sum(m.weight.nbytes for m in base.model.layers.modules() if isinstance(m, nn.Linear))
    packed = sum(layer.nbytes() for layer in packed_layers(model).values())
    assert packed < blocks / 4
    assert model.get_memory_footprint() < base.get_memory_footprint()
