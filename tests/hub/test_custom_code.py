"""A model with Python code of its own on the loopback Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM

from hf_spqr.cli import main
from hf_spqr.nn import SpQRLinear
from hf_spqr.report.records import REPORT_NAME
from tests.custom_code import FILES, add_code, keep_modules_in
from tests.hub.loopback import LoopbackHub
from tests.tiny_models import byte_tokenizer, tiny_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_modules_in(tmp_path / "modules", monkeypatch)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    return int(stop.value.code or 0)


def test_push_sends_the_code(hub: LoopbackHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    custom = add_code(shutil.copytree(folder, tmp_path / "custom"))
    assert run("push", custom, "tester/custom") == 0  # the report says what there is: no code is run
    assert {*FILES} <= {path.name for path in custom.iterdir()}
    card = ModelCard.load("tester/custom").text
    assert 'AutoModelForCausalLM.from_pretrained("tester/custom", trust_remote_code=True)' in card
    loaded = AutoModelForCausalLM.from_pretrained("tester/custom", trust_remote_code=True)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert type(loaded).__name__ == "CustomForCausalLM"
        assert torch.equal(loaded(ids).logits, plain(ids).logits)

    (custom / REPORT_NAME).unlink()
    capsys.readouterr()
    assert run("push", custom, "tester/other") == 1 and "--trust-remote-code" in capsys.readouterr().err
    assert run("push", custom, "tester/other", "--trust-remote-code") == 0


def test_quantize_and_push_what_is_on_the_hub(hub: LoopbackHub, texts: list[str], tmp_path: Path) -> None:
    base, dataset, out = tmp_path / "base", tmp_path / "texts.jsonl", tmp_path / "out"
    tiny_model("llama", torch.float32).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    dataset.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    HfApi().create_repo("tester/base")
    HfApi().upload_folder(repo_id="tester/base", folder_path=add_code(base))
    calibration = ("-d", dataset, "--nsamples", 2, "--seqlen", 32)
    assert run("quantize", "tester/base", out, *calibration, "--trust-remote-code") == 0
    assert {*FILES} <= {path.name for path in out.iterdir()}
    assert "--" not in (out / "config.json").read_text()  # the code is beside the weights, not in the other repository
    assert run("push", out, "tester/quantized") == 0
    del hub.repos["tester/base"]
    loaded = AutoModelForCausalLM.from_pretrained("tester/quantized", trust_remote_code=True)
    assert type(loaded).__name__ == "CustomForCausalLM" and type(loaded.model.layers[0].mlp.up_proj) is SpQRLinear
