"""``optimum-cli hf-spqr``; skipped where optimum is not installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("optimum.commands.base")

from optimum.commands.optimum_cli import main as optimum_cli

from tests.tiny_models import byte_tokenizer, tiny_model


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
    try:
        optimum_cli()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def test_quantize_and_inspect(tmp_path: Path, texts, monkeypatch, capsys) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["-d", str(tmp_path / "text.jsonl"), "--nsamples", "4", "--seqlen", "32", "--bits", "3"]
    assert call(monkeypatch, "hf-spqr", "quantize", str(tmp_path / "base"), str(tmp_path / "q"), *options) == 0
    capsys.readouterr()
    assert call(monkeypatch, "hf-spqr", "inspect", str(tmp_path / "q"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["bits"] == 3


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_is_that_of_hf_spqr(arguments, monkeypatch, capsys) -> None:
    call(monkeypatch, "hf-spqr", *arguments)
    out = "".join(capsys.readouterr())
    assert all(command in out for command in ("quantize", "inspect", "export", "doctor"))


def test_optimum_lists_the_command(monkeypatch, capsys) -> None:
    call(monkeypatch, "--help")
    assert "hf-spqr" in capsys.readouterr().out


def test_mistakes_leave_with_a_message(monkeypatch, capsys, tmp_path) -> None:
    assert call(monkeypatch, "hf-spqr", "inspect", str(tmp_path / "nowhere")) == 1
    assert "nowhere" in capsys.readouterr().err
    assert call(monkeypatch, "hf-spqr", "quantise") == 2
