"""A tiny model, its calibration file, and a runner that returns what the command line printed and its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hf_spqr.cli import main
from tests.tiny_models import byte_tokenizer, tiny_model


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an unquantized model."""
    path = tmp_path_factory.mktemp("cli") / "base"
    tiny_model("llama").save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A jsonl file."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory, base: Path, dataset: Path) -> Path:
    """Folder of the base model after ``hf-spqr quantize``."""
    out = tmp_path_factory.mktemp("out") / "quantized"
    with pytest.raises(SystemExit) as stop:
        main(["quantize", str(base), str(out), "-d", str(dataset), "--nsamples", "8", "--seqlen", "32", "--json"])
    assert not stop.value.code
    return out
