import json
import shutil
from pathlib import Path

import pytest


def test_json_states_protocol_and_true_bits(run, quantized: Path, base: Path, dataset: Path) -> None:
    result = run("eval", quantized, "--base", base, "--dataset", dataset, "--json")
    assert result.code == 0
    data = result.json
    assert data["protocol"] == "per-document"
    assert data["documents"] == 8
    assert data["bits_per_weight"] > 3
    assert data["base"]["bits_per_weight"] is None
    assert data["base"]["tokens"] == data["tokens"]
    assert data["perplexity_ratio"] == pytest.approx(data["perplexity"] / data["base"]["perplexity"])


def test_table_for_people(run, quantized: Path, dataset: Path) -> None:
    result = run("eval", quantized, "-d", dataset, "--protocol", "sliding-window", "--seqlen", 32, "--stride", 8)
    assert result.code == 0
    assert "sliding-window, windows of 32 tokens, stride 8" in result.out
    assert str(quantized) in result.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "zzz"}, "its config.json cannot be read"),
        ({"hidden_size": "wide"}, "its config.json cannot be read"),
        ({"quantization_config": {"quant_method": "zzz"}}, "its quant_method 'zzz'"),
        ({"quantization_config": {"bits": 3}}, "its quant_method None"),
    ],
)
def test_configs_that_cannot_be_used(run, base: Path, dataset: Path, tmp_path: Path, changes, message) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    result = run("eval", folder, "-d", dataset)
    assert result.code == 1 and message in result.err and "Traceback" not in result.err


def test_limit_and_dtype(run, base: Path, dataset: Path) -> None:
    data = run("eval", base, "-d", dataset, "--limit", 2, "--dtype", "bfloat16", "--json").json
    assert data["documents"] == 2
    assert data["dtype"] == "bfloat16"


def test_backend_reaches_the_packed_layers(run, quantized: Path, dataset: Path, monkeypatch) -> None:
    from hf_spqr import evaluate
    from hf_spqr.nn import PackedLinear

    seen = set()

    def spy(model, *arguments, **keywords):
        seen.update(module.backend for module in model.modules() if isinstance(module, PackedLinear))
        return perplexity(model, *arguments, **keywords)

    perplexity = evaluate.perplexity
    monkeypatch.setattr(evaluate, "perplexity", spy)
    result = run("eval", quantized, "-d", dataset, "--limit", 1, "--backend", "int8_activations", "--json")
    assert result.json["backend"] == "int8_activations" and seen == {"int8_activations"}


def test_mistakes_are_messages(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for arguments, message in [
        ((tmp_path / "absent", "-d", dataset), "does not exist"),
        ((base, "-d", tmp_path / "absent.jsonl"), "does not exist"),
        ((base, "-d", empty), "no documents"),
        ((base, "-d", dataset, "--stride", 3), "stride has no meaning"),
        ((base, "-d", dataset, "--protocol", "concatenated", "--seqlen", 100000), "nothing to score"),
    ]:
        result = run("eval", *arguments)
        assert result.code == 1
        assert message in result.err
        assert "Traceback" not in result.err
    assert run("eval", base).code == 2
    for option in (("--backend", "reference"), ("--seqlen", 8), ("--stride", 4)):
        assert "--dataset only" in run("eval", base, "--tasks", "piqa", *option).err
    for option in (("--num-fewshot", 2), ("--task-folder", tmp_path)):
        assert "--tasks only" in run("eval", base, "-d", dataset, *option).err


def test_damaged_folders_are_messages(run, base: Path, quantized: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "unmarked")
    config = json.loads((quantized / "config.json").read_text())
    (tmp_path / "unmarked" / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    shutil.copytree(base, tmp_path / "index")
    (tmp_path / "index" / "model.safetensors").rename(tmp_path / "index" / "other.safetensors")
    (tmp_path / "index" / "model.safetensors.index.json").write_text("{")
    for name, message in [("unmarked", "other shapes than config.json says"), ("index", "index.json is damaged")]:
        result = run("eval", tmp_path / name, "-d", dataset)
        assert result.code == 1
        assert message in " ".join(result.err.split())
        assert "Traceback" not in result.err
