"""Exports of affine models, loaded by plain Transformers and by a decoder written for the test."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_spqr.config import OmniQuantConfig, SpQRConfig
from hf_spqr.errors import UnsupportedLayerError
from hf_spqr.integrations.export import export_model
from hf_spqr.integrations.transformers import attach, quantize_model
from hf_spqr.methods import rtn
from hf_spqr.methods.base import AffineParams
from hf_spqr.nn import AffineLinear, PackedExperts
from tests.formats.test_exchange import gptq_by_hand
from tests.tiny_models import tiny_model

IDS = torch.arange(40)[None] * 5 % 258
LOADER = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.stdin.read().split():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.save(model(torch.arange(40)[None] * 5 % 258).logits, f"{folder}/logits.pt")
assert "hf_spqr" not in sys.modules
"""
CASES = {
    "asymmetric": ({"bits": 4}, "pack-quantized"),
    "symmetric": ({"bits": 4, "symmetric": True, "group_size": -1}, "pack-quantized"),
    "three": ({"bits": 3, "group_size": 16}, "pack-quantized"),
    "eight": ({"bits": 8, "group_size": -1}, "int-quantized"),
    "mixed": ({"bits": 4, "symmetric": True, "overrides": {"down_proj": 8}}, "mixed-precision"),
    "biases": ({"symmetric": True, "kind": "qwen2", "skip": ("layers.0.mlp.up_proj",)}, "pack-quantized"),
    "left": ({"kind": "qwen2", "skip": ("layers.0.mlp.up_proj",)}, "pack-quantized"),
    "shards": ({"symmetric": True, "tie_word_embeddings": True}, "pack-quantized"),
}


def affine_model(bits=4, group_size=32, symmetric=False, overrides=None, kind="llama", skip=(), **changes):
    """A tiny model, rounded to nearest into affine layers."""
    changes = {"hidden_size": 64, "intermediate_size": 96, **changes}
    model = tiny_model(kind, torch.float32, **changes)
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear) and name not in skip:
            width = (overrides or {}).get(name.rpartition(".")[2], bits)
            weight = rtn.quantize(linear.weight.detach(), AffineParams(width, group_size, symmetric=symmetric)).weight
            bias = None if linear.bias is None else linear.bias.detach()
            packed = AffineLinear.from_weight(weight, bias, torch.float32)
            packed.backend = "reference"  # float32 throughout: the two sides are compared closely
            model.model.set_submodule(name, packed)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_compressed_tensors_is_read_by_plain_transformers(tmp_path):
    pytest.importorskip("compressed_tensors")
    expected = {}
    for name, (options, format) in CASES.items():
        model = affine_model(**options)
        expected[name] = logits(model)
        export_model(
            model, tmp_path / name, "compressed-tensors", max_shard_size="60KB" if name == "shards" else "1GB"
        )
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert config["format"] == format
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) >= 2
    done = subprocess.run(
        [sys.executable, "-c", LOADER], capture_output=True, text=True, cwd=tmp_path,
        input="\n".join(str(tmp_path / name) for name in CASES),
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in CASES:
        got = torch.load(tmp_path / name / "logits.pt")
        torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_v2_is_read_by_an_independent_decoder(bits, symmetric, tmp_path):
    model = affine_model(bits, symmetric=symmetric, skip=("layers.1.mlp.down_proj",))
    export_model(model, tmp_path, "gptq_v2")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, 32, symmetric)
    assert set(config["dynamic"]) == {r"-:^model\.layers\.1\.mlp\.down_proj$", "-:^lm_head$"}
    stored = load_file(tmp_path / "model.safetensors")
    dense = tiny_model("llama", torch.float32)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            module = name.removesuffix(".weight")
            if name in stored:
                parameter.copy_(stored[name])
            else:
                leaves = {leaf: stored[f"{module}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")}
                parameter.copy_(gptq_by_hand(leaves, bits))
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-5)


def test_what_a_format_cannot_say_is_refused_and_nothing_is_written(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UnsupportedLayerError, match="use one of"):
        export_model(affine_model(), out, "awq")
    with pytest.raises(UnsupportedLayerError, match="no packed layers"):
        export_model(tiny_model(), out, "gptq_v2")
    with pytest.raises(UnsupportedLayerError, match="SpQR models only"):
        export_model(affine_model(), out, "spqr")
    with pytest.raises(UnsupportedLayerError, match="bits 2, 3, 4, 8"):
        export_model(affine_model(bits=6), out, "gptq_v2")
    with pytest.raises(UnsupportedLayerError, match="one width"):
        export_model(affine_model(overrides={"q_proj": 8}), out, "gptq_v2")
    experts = tiny_model("mixtral", torch.float32)
    config = SpQRConfig(dataset=[[5, 6, 7, 8] * 8], nsamples=1, seqlen=32)
    quantize_model(experts, config, progress=False)
    with pytest.raises(UnsupportedLayerError, match="knows no experts"):
        export_model(experts, out, "spqr")
    assert not out.exists()


def mixed_model(texts, tokenizer, **own):
    """A tiny Llama quantized with overrides; ``own`` of the layers that have none."""
    config = OmniQuantConfig(
        bits=4, group_size=16, epochs=1, dataset=texts, nsamples=2, seqlen=32,
        overrides={"down_proj": {"bits": 8, "group_size": -1}, "q_proj": {"bits": 8, "sym": False}}, **own,
    )  # fmt: skip
    model = tiny_model("llama", torch.float32)
    quantize_model(model, config, tokenizer=tokenizer, progress=False)
    return model


def test_overrides_of_a_quantized_model_are_written(texts, tokenizer, tmp_path):
    model = mixed_model(texts, tokenizer, sym=True)
    with pytest.raises(UnsupportedLayerError, match=r"one width and group size.*Use compressed-tensors"):
        export_model(model, tmp_path / "gptq", "gptq_v2")
    export_model(model, tmp_path / "ct", "compressed-tensors")
    written = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    said = {}
    for group in written["config_groups"].values():
        scheme = group["weights"]
        said |= dict.fromkeys(group["targets"], (scheme["num_bits"], scheme["group_size"], scheme["symmetric"]))
    assert said == {
        f"model.layers.{index}.{name}_proj": kind
        for index in range(2)
        for kind, names in {
            (4, 16, True): ("self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up"),
            (8, 16, False): ("self_attn.q",),
            (8, None, True): ("mlp.down",),
        }.items()
        for name in names
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model.dequantize()), rtol=1e-3, atol=1e-4)


def test_mixed_layers_that_transformers_would_read_wrongly_are_refused(texts, tokenizer, tmp_path):
    with pytest.raises(UnsupportedLayerError, match="sym=True"):
        export_model(mixed_model(texts, tokenizer), tmp_path / "ct", "compressed-tensors")
    assert not (tmp_path / "ct").exists()


@pytest.mark.parametrize("act_sym", [False, True])
def test_the_activation_scheme_is_written(act_sym, tmp_path):
    model = affine_model(bits=4, group_size=-1)
    attach(model, OmniQuantConfig(bits=4, group_size=-1, act_bits=8, act_sym=act_sym))
    with pytest.raises(UnsupportedLayerError, match="silently"):
        export_model(model, tmp_path / "gptq", "gptq_v2")
    with pytest.warns(UserWarning, match="q, k and v"):
        export_model(model, tmp_path / "ct", "compressed-tensors")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    activations = config["config_groups"]["group_0"]["input_activations"]
    assert (activations["num_bits"], activations["strategy"], activations["dynamic"]) == (8, "token", True)
    assert activations["symmetric"] is act_sym
    assert model.config.quantization_config.act_bits == 8
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_are_written_one_by_one(kind, texts, tokenizer, tmp_path):
    config = OmniQuantConfig(
        bits=4, group_size=32, sym=True, rounding=False, epochs=0, dataset=texts, nsamples=2, seqlen=32
    )
    sizes = {"moe_intermediate_size": 64} if kind == "qwen3_moe" else {}
    model = tiny_model(kind, torch.float32, **sizes)
    quantize_model(model, config, tokenizer=tokenizer, progress=False)
    experts = next(name for name, module in model.named_modules() if isinstance(module, PackedExperts))
    export_model(model, tmp_path / "ct", "compressed-tensors")
    export_model(model, tmp_path / "gptq", "gptq_v2")
    written = load_file(tmp_path / "gptq" / "model.safetensors")
    assert not [name for name in written if name.endswith("packed") or not written[name].numel()]
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert any("gate" in name for name in config["dynamic"])
    last = {"qwen3_moe": "down_proj", "mixtral": "w2"}[kind]
    (name,) = (n for n in written if re.search(rf"layers\.0\..*experts\.3\.{last}\.qweight$", n))
    name = name.removesuffix(".qweight")
    expected = model.get_submodule(experts).packed["down_proj"].dequantize_weight(torch.float32)[3]
    leaves = {leaf: written[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    torch.testing.assert_close(gptq_by_hand(leaves, 4).float(), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model.dequantize()), rtol=1e-3, atol=1e-4)


def test_export_leaves_the_model_as_it_was(tmp_path):
    model = affine_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, tmp_path, "gptq_v2")
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert isinstance(AutoModelForCausalLM.from_config(model.config), type(model))
