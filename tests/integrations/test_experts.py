"""Mixture-of-experts models: packed and fused in memory, one by one and under their original names in the file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_spqr import CheckpointError, OmniQuantConfig, SpQRConfig
from hf_spqr.integrations.transformers import quantize_model
from hf_spqr.nn import PackedExperts
from tests.integrations.conftest import IDS, quantize_folder
from tests.tiny_models import byte_tokenizer, tiny_model

MOE = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "gpt_oss": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "llama4_text": ("feed_forward.experts", ("gate_proj", "up_proj", "down_proj")),
}
LAYER = 1  # deepseek_v3 has no experts in its first layer


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


def stored(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def saved(tmp_path_factory, texts):
    """Quantizes each kind of model once."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            base = tiny_model(kind)
            base.save_pretrained(folder / "base")
            byte_tokenizer().save_pretrained(folder / "base")
            model = quantize_folder(folder / "base", texts, bits=4, nsamples=4, seqlen=64)
            model.save_pretrained(folder / "q")
            made[kind] = folder, base, model
        return made[kind]

    return make


@pytest.mark.parametrize("kind", MOE)
def test_round_trip_is_exact(kind, saved, tmp_path):
    folder, base, model = saved(kind)
    experts = [m for m in model.modules() if isinstance(m, PackedExperts)]
    assert len(experts) == (1 if kind == "deepseek_v3" else 2)
    assert 0 < distance(logits(model), logits(base)) < 0.4
    again, info = AutoModelForCausalLM.from_pretrained(folder / "q", output_loading_info=True)
    assert not any(info.values())
    assert_same(model, again)
    assert torch.equal(logits(model), logits(again))
    again.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    first, second = stored(folder / "q"), stored(tmp_path)
    assert first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())


@pytest.mark.parametrize("kind", MOE)
def test_original_names_in_the_file(kind, saved):
    folder, _, _ = saved(kind)
    module, projections = MOE[kind]
    names = {name for name in stored(folder / "q") if f"layers.{LAYER}.{module}" in name}
    leaves = ("packed", "outlier_row", "outlier", "perm")
    expected = {f"{e}.{p}.{leaf}" for e in range(4) for p in projections for leaf in leaves}
    expected |= {"gate_up_proj", "down_proj"}  # empty: a load without this package fails on their shape
    if kind == "gpt_oss":
        expected |= {"gate_up_proj_bias", "down_proj_bias"}
    assert names == {f"model.layers.{LAYER}.{module}.{name}" for name in expected}
    original = {n for n in stored(folder / "base") if f"layers.{LAYER}.{module}.0." in n}
    if original:  # gpt_oss and llama4 have fused experts in their files
        assert original == {f"model.layers.{LAYER}.{module}.0.{p}.weight" for p in projections}


@pytest.mark.parametrize("kind", MOE)
def test_dequantize_gives_back_the_original_layout(kind, saved, tmp_path):
    folder, base, model = saved(kind)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "q")
    loaded.dequantize()
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in base.state_dict().items()}
    assert distance(logits(loaded), logits(model)) < 1e-3
    loaded.save_pretrained(tmp_path)
    assert stored(tmp_path).keys() == stored(folder / "base").keys()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(plain, loaded)
    assert torch.equal(logits(plain), logits(loaded))


def test_report_counts_experts_with_too_few_tokens(texts, tokenizer):
    model = tiny_model("mixtral")
    config = SpQRConfig(bits=4, dataset=texts, nsamples=2, seqlen=32)
    report = quantize_model(model, config, tokenizer=tokenizer, progress=False)
    layer = report.layer("model.layers.0.mlp.experts.down_proj")
    assert (layer.experts, layer.undersampled, layer.shape) == (4, 4, (4 * 64, 96))
    assert any("4 of 4 experts saw fewer than 96 tokens" in note for note in report.notes)
    assert layer.nbytes == model.model.layers[0].mlp.experts.packed["down_proj"].nbytes()
    assert [x.name for x in report.layers if "layers.1.mlp" in x.name] == [
        f"model.layers.1.mlp.experts.{p}_proj" for p in ("gate", "up", "down")
    ]


def test_damping_that_had_to_be_raised_is_reported(texts, tokenizer):
    """With fewer tokens than inputs no Hessian is positive definite by itself."""
    model = tiny_model("mixtral")
    config = SpQRConfig(bits=4, dataset=texts, nsamples=1, seqlen=16, percdamp=0.0)
    report = quantize_model(model, config, tokenizer=tokenizer, progress=False)
    assert "model.layers.0.mlp.experts.down_proj: the damping was raised for 4 experts." in report.notes
    start = "model.layers.0.self_attn.q_proj: the Hessian was not positive definite, damping was raised to "
    assert any(note.startswith(start) for note in report.notes)


def test_an_expert_without_tokens_is_as_good_as_the_others(texts, tokenizer):
    model = tiny_model("mixtral", num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.model.layers:  # the first or the second, whichever is positive, never the last two
            layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
            layer.mlp.gate.weight[2:] = 0
    config = SpQRConfig(bits=4, dataset=texts[:1], nsamples=1, seqlen=16)
    report = quantize_model(model, config, tokenizer=tokenizer, progress=False)
    assert all(layer.error < 0.2 for layer in report.layers)
    assert any("4 of 4 experts saw fewer than 96 tokens (2 of them none)" in note for note in report.notes)
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.check()


@pytest.mark.parametrize("kind", [SpQRConfig, OmniQuantConfig])
def test_overrides_and_exclusions(kind, texts, tokenizer, tmp_path):
    model = tiny_model("qwen3_moe")
    config = kind(
        bits=4, group_size=16, dataset=texts, nsamples=2, seqlen=32,
        overrides={"down_proj": {"bits": 6, "group_size": 32}},
        modules_to_not_convert=["layers.0.mlp.experts.up_proj"],
    )  # fmt: skip
    quantize_model(model, config, tokenizer=tokenizer, progress=False)
    assert not isinstance(model.model.layers[0].mlp.experts, PackedExperts)
    packed = model.model.layers[1].mlp.experts.linears()
    assert {n: (x.layout.bits, x.layout.group_size) for n, x in packed.items()} == {
        "gate_proj": (4, 16), "up_proj": (4, 16), "down_proj": (6, 32),
    }  # fmt: skip
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, again)
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize(
    "fields", [{"group_size": 16}, {"group_size": -1, "act_bits": 8}, {"group_size": 16, "sym": True}]
)
def test_omniquant_packs_experts_too(fields, texts, tokenizer, tmp_path):
    model = tiny_model("mixtral")
    before = logits(model)
    config = OmniQuantConfig(bits=4, epochs=1, dataset=texts, nsamples=2, seqlen=32, **fields)
    report = quantize_model(model, config, tokenizer=tokenizer, progress=False)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, PackedExperts)
    assert all(linear.act_bits == fields.get("act_bits") for linear in experts.linears().values())
    assert 0 < report.layer("model.layers.1.mlp.experts.up_proj").error < 0.2
    assert 0 < distance(logits(model), before) < 0.4
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, again)
    assert torch.equal(logits(model), logits(again))


def test_device_map_and_offload(saved, tmp_path):
    folder, _, model = saved("mixtral")
    again = AutoModelForCausalLM.from_pretrained(folder / "q", device_map="auto")
    assert torch.equal(logits(model), logits(again))
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    off = AutoModelForCausalLM.from_pretrained(folder / "q", device_map=device_map, offload_folder=tmp_path / "off")
    assert torch.equal(logits(model), logits(off))
    with pytest.raises(CheckpointError, match="offloaded"):
        off.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("expert", "lacks 'outlier' of up_proj of expert 2|packed tensors that belong to no packed linear layer"),
        ("tensor", "lacks 'outlier_row' of up_proj of expert 2"),
        ("stray", "belong to no packed linear layer"),
        ("more", "has a tensor 'scales' for up_proj of expert 2"),
    ],
)
def test_damaged_experts_are_refused(damage, message, saved, tmp_path):
    folder, _, _ = saved("mixtral")
    tensors = stored(folder / "q")
    name = "model.layers.1.block_sparse_moe.experts.2.w3"
    if damage == "stray":
        tensors["model.layers.1.block_sparse_moe.experts.9.w3.packed"] = tensors[f"{name}.packed"].clone()
    elif damage == "more":
        tensors[f"{name}.scales"] = torch.zeros(4)
    else:
        for leaf in ("packed", "outlier_row", "outlier", "perm") if damage == "expert" else ("outlier_row",):
            del tensors[f"{name}.{leaf}"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_bytes((folder / "q" / file).read_bytes())
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_without_this_package_the_load_fails(saved, tmp_path):
    folder, _, _ = saved("mixtral")
    (tmp_path / "model.safetensors").write_bytes((folder / "q" / "model.safetensors").read_bytes())
    config = json.loads((folder / "q" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_compiles_in_one_graph(saved):
    _, _, model = saved("qwen3_moe")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_gradient_reaches_the_embeddings(saved):
    folder, _, _ = saved("gpt_oss")
    model = AutoModelForCausalLM.from_pretrained(folder / "q")
    embeddings = model.get_input_embeddings()
    embeddings.weight.requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    assert embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_in_another_dtype(saved, dtype):
    folder, _, model = saved("mixtral")
    again = AutoModelForCausalLM.from_pretrained(folder / "q", dtype=dtype)
    assert next(m for m in again.modules() if isinstance(m, PackedExperts)).down_proj.dtype == dtype
    assert distance(logits(again), logits(model)) < 0.1
