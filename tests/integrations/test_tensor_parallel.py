"""``tp_plan="auto"`` on several ranks gives what one process gives. Two ranks load all of their models, one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_spqr import ConfigError, OmniQuantConfig, SpQRConfig, UnsupportedLayerError, quantize_model
from hf_spqr.integrations.export import export_model
from hf_spqr.integrations.gptq import load_gptq_v2
from hf_spqr.nn import PackedExperts, PackedLinear
from tests.ranks import run_ranks
from tests.tiny_models import byte_tokenizer, tiny_model

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 23)[None]
NEW_TOKENS = 8
SPQR = {"bits": 3, "nsamples": 8, "seqlen": 64}
OMNI = {"nsamples": 4, "seqlen": 32, "epochs": 1}
MORE = (
    "mistral", "qwen3", "gemma2", "gemma3_text", "cohere2", "olmo2", "granite", "starcoder2", "qwen2_moe", "qwen3_moe",
    "olmoe", "llama4_text", "glm4", "glm4_moe", "exaone4", "smollm3", "phimoe", "minimax", "ernie4_5", "nemotron",
    "helium",
)  # fmt: skip
"""Architectures, besides those of CASES, that have a plan."""
# 104 = 6.5 blocks of rows and 6.5 groups of columns: the cut is not where statistics end
CASES = {
    "spqr": ("llama", {"intermediate_size": 1024}, SpQRConfig(**SPQR, act_order=False)),
    "spqr, order": ("llama", {"intermediate_size": 104}, SpQRConfig(**SPQR, act_order=True)),
    "spqr, bias": ("qwen2", {"intermediate_size": 104}, SpQRConfig(**SPQR, act_order=False, second_group=32)),
    "spqr, bias on all": ("gpt_neox", {}, SpQRConfig(**SPQR)),
    "spqr, gathered": ("phi3", {}, SpQRConfig(**SPQR)),
    "spqr, experts": ("mixtral", {}, SpQRConfig(**SPQR)),
    "spqr, latent": ("deepseek_v3", {}, SpQRConfig(**SPQR)),
    "spqr, mixed": ("llama", {}, SpQRConfig(**SPQR, modules_to_not_convert=["layers.0.mlp", "layers.1.self_attn"])),
    "W4A16g32": ("llama", {"intermediate_size": 104}, OmniQuantConfig(4, 32, **OMNI)),
    "W4A16g32, mixed": (
        "llama",
        {},
        OmniQuantConfig(4, 32, overrides={"down_proj": {"bits": 8, "group_size": -1}}, **OMNI),
    ),
    "W3A16": ("qwen2", {"intermediate_size": 104}, OmniQuantConfig(3, -1, **OMNI)),
    "W8A8": ("llama", {"intermediate_size": 104}, OmniQuantConfig(8, -1, 8, **OMNI)),
}


def load(folder: Path, **arguments: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def divided(folder: Path, size: int = 2, **arguments: object) -> torch.nn.Module:
    return load(folder, distributed_config=DistributedConfig(tp_size=size, tp_plan="auto"), **arguments)


def expert_parallel() -> DistributedConfig:
    """As this version of Transformers asks for it."""
    if "ep_size" in DistributedConfig.__dataclass_fields__:
        return DistributedConfig(tp_size=2, ep_size=2)
    return DistributedConfig(tp_size=2, enable_expert_parallel=True)


@torch.no_grad()
def outputs(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = model.generate(IDS, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return model(IDS).logits, tokens


def packed_bytes(model: torch.nn.Module) -> int:
    linears = sum(m.nbytes() for m in model.modules() if isinstance(m, PackedLinear))
    experts = [m for m in model.modules() if isinstance(m, PackedExperts)]
    return linears + sum(linear.nbytes() for m in experts for linear in m.linears().values())


def on_a_rank(folders: dict[str, Path]) -> dict[str, object]:
    results: dict[str, object] = {}
    for name, folder in folders.items():
        model = divided(folder)
        results[name] = (*outputs(model), packed_bytes(model))
        model.save_pretrained(folder.parent / "again" / folder.name)
    experts = folders["spqr, experts"]
    results["expert parallel"] = failure(lambda: load(experts, distributed_config=expert_parallel()))
    foreign = folders["spqr"].parent / "gptq"
    results["import"] = failure(lambda: load_gptq_v2(foreign, distributed_config=DistributedConfig(tp_size=2)))
    results["dequantize"] = failure(model.dequantize)
    config = SpQRConfig(**SPQR, dataset=IDS.repeat(8, 1))
    results["quantize"] = failure(lambda: divided(folders["spqr"].parent / "base", quantization_config=config))
    return results


def uses_on_a_rank(folders: dict[str, Path]) -> dict[str, dict[str, float | bool]]:
    """How far gradients and the compiled model are from those of one process; whether the same tokens come out."""
    found = {}
    for name in ("spqr", "spqr, order"):
        whole, part = load(folders[name]), divided(folders[name])
        texts, cache = torch.cat([IDS, IDS + 7]), {"cache_implementation": "static"}
        arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        tokens = [model.generate(texts, **arguments, **cache) for model in (whole, part)]
        embeddings = [model.get_input_embeddings()(IDS).detach().requires_grad_() for model in (whole, part)]
        for model, x in zip((whole, part), embeddings, strict=True):
            model(inputs_embeds=x).logits.square().sum().backward()
        expected, got = (x.grad for x in embeddings)
        with torch.no_grad():
            compiled, logits = torch.compile(part, backend="aot_eager")(IDS).logits, whole(IDS).logits
        found[name] = {
            "same tokens": torch.equal(*tokens),
            "gradient": float((got - expected).abs().max() / expected.abs().max()),
            "compiled": float((compiled - logits).abs().max() / logits.abs().max()),
        }
    return found


def errors_on_a_rank(folders: dict[str, Path]) -> dict[str, float]:
    """Distance of the logits to those of the whole model, relative to the largest."""
    errors = {}
    with torch.no_grad():
        for kind, folder in folders.items():
            expected = load(folder)(IDS).logits
            got = load(folder, tp_plan="auto")(IDS).logits
            errors[kind] = float((got - expected).abs().max() / expected.abs().max())
    return errors


def outputs_on_a_rank(folders: dict[str, Path], size: int) -> dict[str, object]:
    """What each model gives, or how its load fails."""
    return {
        name: failure(lambda folder=folder: divided(folder, size)) or outputs(divided(folder, size))
        for name, folder in folders.items()
    }


def failure(call) -> tuple[type, str] | None:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.fixture(scope="module")
def folders(tmp_path_factory, texts) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("divided"), {}
    tiny_model("llama").save_pretrained(root / "base")
    for name, (kind, changes, config) in CASES.items():
        model = tiny_model(kind, **changes)
        config.dataset = texts
        quantize_model(model, config, tokenizer=byte_tokenizer(), progress=False)
        made[name] = root / name.replace(", ", "_").replace(" ", "_")
        model.save_pretrained(made[name])
    model = tiny_model("llama")
    quantize_model(model, OmniQuantConfig(4, 32, dataset=texts, **OMNI), tokenizer=byte_tokenizer(), progress=False)
    export_model(model, root / "gptq", "gptq_v2")
    return made


@pytest.fixture(scope="module")
def ranks(folders) -> list[dict[str, object]]:
    return run_ranks(on_a_rank, folders)


@pytest.mark.parametrize("name", [name for name in CASES if name != "W8A8"])
def test_as_one_process(name, folders, ranks):
    model = load(folders[name])
    logits, tokens = outputs(model)
    for got, generated, _ in (rank[name] for rank in ranks):
        assert float((got - logits).abs().max()) < 1e-4 * float(logits.abs().max())
        assert torch.equal(generated, tokens)
    assert torch.equal(ranks[0][name][0], ranks[1][name][0])


def test_quantized_activations_have_the_grid_of_the_whole_token(folders, ranks):
    """A sum in another order moves a few values to the next of 255 steps; on grids of their own all would move.

    The first token has few values, none of which moves; what later ones see of each other is less exact.
    """
    logits, tokens = outputs(load(folders["W8A8"]))
    scale = float(logits.abs().max())
    for got, generated, _ in (rank["W8A8"] for rank in ranks):
        by_token = (got - logits).abs().amax(-1).flatten() / scale
        assert float(by_token[0]) < 2e-5 and float(by_token.max()) < 1e-2
        assert torch.equal(generated, tokens)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_a_part(name, folders, ranks):
    """Small layers share statistics at the cut; where it falls between panels, the parts add up to the whole."""
    whole = packed_bytes(load(folders[name]))
    held = [rank[name][2] for rank in ranks]
    assert all(0.35 * whole < part < 0.85 * whole for part in held)
    if name == "spqr":
        assert sum(held) < 1.15 * whole


@pytest.mark.parametrize("name", CASES)
def test_saved_again(name, folders, ranks):
    """The ranks put their parts together: the same tensors, in one file."""
    folder = folders[name]
    again = folder.parent / "again" / folder.name
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    expected, got = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert got.keys() == expected.keys()
    assert [key for key, tensor in expected.items() if not torch.equal(got[key], tensor)] == []
    assert torch.equal(outputs(load(again))[0], outputs(load(folder))[0])


def test_what_is_refused(ranks, folders):
    for rank in ranks:
        assert rank["dequantize"][0] is UnsupportedLayerError and "cannot be dequantized" in rank["dequantize"][1]
        assert rank["expert parallel"][0] is UnsupportedLayerError and "expert-parallel" in rank["expert parallel"][1]
        assert rank["import"][0] is UnsupportedLayerError and "hf-spqr convert" in rank["import"][1]
        assert rank["quantize"][0] is ConfigError and "divided among ranks" in rank["quantize"][1]


def test_static_cache_gradients_and_compile(folders):
    for found in run_ranks(uses_on_a_rank, folders):
        for name in ("spqr", "spqr, order"):
            assert found[name]["same tokens"]
            assert found[name]["gradient"] < 1e-4 and found[name]["compiled"] < 1e-4


def test_more_architectures(tmp_path, texts):
    for kind in MORE:
        model, config = tiny_model(kind), SpQRConfig(**SPQR, dataset=texts)
        quantize_model(model, config, tokenizer=byte_tokenizer(), progress=False)
        model.save_pretrained(tmp_path / kind)
    for errors in run_ranks(errors_on_a_rank, {kind: tmp_path / kind for kind in MORE}):
        assert {kind: error for kind, error in errors.items() if not error < 2e-4} == {}


SIZES = {
    3: {
        "uneven": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3,
                             "intermediate_size": 104}),
        "heads": ("llama", {}),
        "experts": ("mixtral", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}),
    },
    4: {
        "even": ("llama", {"vocab_size": 260, "num_key_value_heads": 4, "intermediate_size": 104}),
        "heads": ("llama", {"vocab_size": 260}),
        "experts": ("mixtral", {"vocab_size": 260, "num_key_value_heads": 4}),
    },
}  # fmt: skip
"""With 260 tokens for four: Transformers 5.17 divides a head only where its rows can be divided evenly."""
REFUSED = {
    (3, "heads"): "2 heads of keys and values cannot be divided among 3 ranks",
    (3, "experts"): "4 experts cannot be divided among 3 ranks, at least one would get nothing",
    (4, "heads"): "2 heads of keys and values cannot be divided among 4 ranks",
}


@pytest.mark.parametrize("size", SIZES)
def test_three_and_four_ranks(size, tmp_path, texts):
    """Layers of any width are divided, also where a rank gets less; what cannot be divided says so."""
    folders = {}
    for name, (kind, changes) in SIZES[size].items():
        model = tiny_model(kind, **changes)
        quantize_model(model, SpQRConfig(**SPQR, dataset=texts), tokenizer=byte_tokenizer(), progress=False)
        folders[name] = tmp_path / name
        model.save_pretrained(folders[name])
    for found in run_ranks(outputs_on_a_rank, folders, size, size=size, timeout=300):
        for name, folder in folders.items():
            if message := REFUSED.get((size, name)):
                assert found[name][0] is ConfigError and message in found[name][1]
                continue
            logits, tokens = outputs(load(folder))
            assert torch.equal(found[name][1], tokens)
            assert float((found[name][0] - logits).abs().max()) < 1e-4 * float(logits.abs().max())
