"""Official SpQR checkpoints: written by our export, damaged as the published converter does, loaded again."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_spqr
from hf_spqr.formats import official_spqr, spqr
from hf_spqr.integrations.export import export_model
from hf_spqr.nn import SpQRLinear
from tests.formats.test_official_spqr import raw_copy
from tests.tiny_models import tiny_model

IDS = torch.arange(40)[None] * 5 % 258


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.fixture(scope="module")
def quantized(texts, tokenizer):
    model = tiny_model("llama", torch.float32)
    config = hf_spqr.SpQRConfig(dataset=texts, nsamples=4, seqlen=64, outlier_threshold=0.2)
    hf_spqr.quantize_model(model, config, tokenizer=tokenizer, progress=False)
    hf_spqr.integrations.transformers.attach(model, config)
    return model


@pytest.fixture(scope="module")
def official(quantized, tmp_path_factory):
    return export_model(quantized, tmp_path_factory.mktemp("official"), "spqr")


@pytest.fixture(scope="module")
def raw(official, tmp_path_factory):
    """The same checkpoint as the published converter would have written it."""
    folder = tmp_path_factory.mktemp("raw")
    config = json.loads((official / "config.json").read_text())
    del config["quantization_config"]["outlier_values"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(official / "model.safetensors")
    for name in [key.removesuffix(".dense_weights") for key in tensors if key.endswith(".dense_weights")]:
        parts = {leaf: tensors[f"{name}.{leaf}"] for leaf in official_spqr.TENSORS}
        columns = 2 * parts["in_perm"].numel()
        weight = official_spqr.decode(16 * parts["dense_weights"].numel() // columns, columns, parts)
        damaged = raw_copy(weight)
        codes = official_spqr.encode(dataclasses.replace(damaged, outlier_value=damaged.outlier_value * 0))
        tensors[f"{name}.dense_weights"] = codes["dense_weights"]
        tensors[f"{name}.col_vals"] = (damaged.outlier_value.view(torch.int16).int() << 16) | damaged.outlier_col
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_export_and_load_give_the_same_model(quantized, official, recwarn):
    loaded = AutoModelForCausalLM.from_pretrained(official, dtype=torch.float32)
    assert not [w for w in recwarn if "outliers" in str(w.message)]
    torch.testing.assert_close(logits(loaded), logits(quantized), rtol=0, atol=5e-3)
    layer = loaded.model.layers[1].mlp.down_proj
    assert isinstance(layer, SpQRLinear)
    before = quantized.model.layers[1].mlp.down_proj
    a, b = (spqr.unpack(m.layout, m.packed_tensors()) for m in (before, layer))
    assert torch.equal(a.scale_codes, b.scale_codes) and torch.equal(a.second, b.second)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.outlier_value, b.outlier_value)
    assert quantized.hf_quantizer is not None and quantized.config.quantization_config.quant_method == "hf_spqr"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_raw_outliers_are_repaired_with_a_warning(quantized, raw, dtype):
    with pytest.warns(UserWarning, match="detected as raw weights .* They were repaired"):
        loaded = AutoModelForCausalLM.from_pretrained(raw, dtype=dtype)
    assert loaded.dtype == dtype
    scale = logits(quantized).abs().max()
    tolerance = {torch.float32: 2**-9, torch.float16: 2**-8, torch.bfloat16: 2**-4}[dtype]
    assert (logits(loaded) - logits(quantized)).abs().max() < tolerance * scale
    assert "repaired" in " ".join(loaded.quantization_report.notes)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_saved_again_it_is_in_our_format(raw, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(raw, dtype=torch.float32)
    loaded.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "hf_spqr" and "shapes" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(loaded))
    dense = loaded.dequantize()
    torch.testing.assert_close(logits(dense), logits(again), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_loading_options_and_transformers_own_config_are_taken(raw):
    loaded = AutoModelForCausalLM.from_pretrained(raw, quantization_config=hf_spqr.SpQRConfig(backend="reference"))
    assert loaded.model.layers[0].mlp.up_proj.backend == "reference"
    AutoModelForCausalLM.from_pretrained(raw, quantization_config=transformers.SpQRConfig())


def test_device_maps(quantized, official, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(official, dtype=torch.float32, device_map="cpu")
    torch.testing.assert_close(logits(loaded), logits(quantized), rtol=0, atol=5e-3)
    to_disk = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    to_disk |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(hf_spqr.UnsupportedLayerError, match="hf-spqr convert"):
        AutoModelForCausalLM.from_pretrained(official, device_map=to_disk, offload_folder=tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(quantized, official, dtype, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(official, dtype=dtype, device_map="cuda")
    assert loaded.model.layers[0].mlp.up_proj.packed.is_cuda
    with torch.no_grad():
        got = loaded(IDS.to("cuda")).logits.float().cpu()
    assert (got - logits(quantized)).abs().max() < 0.05 * logits(quantized).abs().max()
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(again.model.layers[0].mlp.up_proj.packed, loaded.model.layers[0].mlp.up_proj.packed.cpu())


def test_it_does_not_quantize(model_dir):
    with pytest.raises(hf_spqr.ConfigError, match=r"pass hf_spqr\.SpQRConfig"):
        AutoModelForCausalLM.from_pretrained(model_dir(), quantization_config=transformers.SpQRConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.row_offsets"), r"lacks model\.layers\.0\.mlp\.up_proj\.row_off"),
        (lambda t: t.pop("model.layers.0.input_layernorm.weight"), r"lacks model\.layers\.0\.input_layernorm"),
        (lambda t: t.update({"x.dense_weights": torch.zeros(1)}), "no linear layer"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.in_perm": torch.zeros(32, dtype=torch.int32)}),
            r"up_proj: in_perm does not hold",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(official, tmp_path, change, message):
    (tmp_path / "config.json").write_text((official / "config.json").read_text())
    tensors = load_file(official / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hf_spqr.CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_other_widths_are_refused():
    with pytest.raises(hf_spqr.CheckpointError, match="bits=3"):
        hf_spqr.integrations.legacy.SpQRConfig(bits=4)


def test_without_an_import_the_entry_point_takes_the_key_over(official):
    code = (
        "import hf_spqr_autoload; hf_spqr_autoload.init()\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(official)!r})\n"
        "print(type(m.model.layers[0].mlp.up_proj).__name__)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "SpQRLinear", done.stderr


@pytest.mark.shared
def test_the_fixture_matches_its_reference(shared_dir):
    folder = shared_dir / "fixtures" / "official_spqr"
    with pytest.warns(UserWarning, match="repaired"):
        loaded = AutoModelForCausalLM.from_pretrained(folder / "tiny_hub", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder / "tiny_ref", dtype=torch.float32)
    for name, module in loaded.named_modules():
        if isinstance(module, SpQRLinear):
            expected = reference.get_submodule(name).weight
            assert (module.dequantize_weight() - expected).abs().max() <= 2**-10 * expected.abs().max()
    assert (logits(loaded) - logits(reference)).abs().max() < 2e-3
