"""Commands on models with Python code of their own: nothing of it runs without ``--trust-remote-code``."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_spqr.report.records import REPORT_NAME
from tests.custom_code import FILES, add_code, keep_modules_in

TRUST = "--trust-remote-code"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_modules_in(tmp_path / "modules", monkeypatch)
    monkeypatch.setattr(builtins, "input", lambda *arguments: pytest.fail("a command asked a question"))


@pytest.fixture
def custom(base: Path, tmp_path: Path) -> Path:
    return add_code(shutil.copytree(base, tmp_path / "custom"))


def test_without_the_option_nothing_runs(
    run: Callable, custom: Path, quantized: Path, dataset: Path, tmp_path: Path
) -> None:
    for name in FILES:
        (custom / name).write_text("raise SystemError('was run')\n")
    packed = add_code(shutil.copytree(quantized, tmp_path / "packed"))
    for command in (
        ("quantize", custom, tmp_path / "out", "-d", dataset),
        ("eval", custom, "-d", dataset),
        ("export", packed, tmp_path / "out", "--format", "spqr"),
        ("convert", custom, tmp_path / "out"),
    ):
        done = run(*command)
        assert done.code == 1 and f"add {TRUST}" in " ".join(done.err.split()), command
    assert not (tmp_path / "out").exists()
    assert run("inspect", packed).code == 0  # the report says all
    (packed / REPORT_NAME).unlink()
    done = run("inspect", packed)
    assert done.code == 1 and TRUST in " ".join(done.err.split())


def test_a_tokenizer_with_code_is_named(run: Callable, base: Path, dataset: Path, tmp_path: Path) -> None:
    """Beside a model that has none."""
    custom = add_code(shutil.copytree(base, tmp_path / "custom"))
    shutil.copyfile(base / "config.json", custom / "config.json")
    done = run("eval", custom, "-d", dataset)
    assert done.code == 1 and f"add {TRUST}" in " ".join(done.err.split())
    assert run("eval", custom, "-d", dataset, "--limit", 1, TRUST).code == 0


def test_the_whole_way(run: Callable, custom: Path, dataset: Path, tmp_path: Path) -> None:
    out, exported = tmp_path / "packed", tmp_path / "exported"
    calibration = ("-d", dataset, "--nsamples", 4, "--seqlen", 32)
    done = run("quantize", custom, out, *calibration, TRUST)
    assert done.code == 0, done.err
    assert {path.name for path in out.iterdir()} >= {*FILES, "processor_config.json"}
    shutil.rmtree(custom)  # the result stands on its own

    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert type(model).__name__ == "CustomForCausalLM" and type(tokenizer).__name__ == "CustomTokenizer"

    done = run("eval", out, "-d", dataset, "--limit", 2, TRUST, "--json")
    assert done.code == 0 and done.json["bits_per_weight"] < 8, done.err
    with_report = run("inspect", out, "--json").json["layers"]
    (out / REPORT_NAME).unlink()
    done = run("inspect", out, TRUST, "--json")
    assert [layer["shape"] for layer in done.json["layers"]] == [layer["shape"] for layer in with_report]

    done = run("export", out, exported, "--format", "spqr", TRUST)
    assert done.code == 0, done.err
    assert {path.name for path in exported.iterdir()} >= {*FILES}
    done = run("convert", exported, tmp_path / "back", TRUST)
    assert done.code == 0, done.err
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True)
    kept = back.state_dict()
    packed = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".packed")}
    assert len(packed) == 14 and all(torch.equal(kept[name], tensor) for name, tensor in packed.items())


def test_an_encoder_with_code_is_no_language_model(run: Callable, custom: Path, dataset: Path) -> None:
    config = json.loads((custom / "config.json").read_text())
    places = {"AutoConfig": config["auto_map"]["AutoConfig"], "AutoModelForMaskedLM": "modeling_custom.CustomMasked"}
    (custom / "config.json").write_text(json.dumps(config | {"architectures": ["CustomMasked"], "auto_map": places}))
    done = run("eval", custom, "-d", dataset, TRUST)
    assert done.code == 1 and "no causal language model" in " ".join(done.err.split())
