"""``hf-spqr quantize`` under torchrun: the result of one process, one writer, nothing left when a process fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_spqr.cli.processes import _stdout_kept_clear

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DATA = ("--nsamples", "24", "--seqlen", "256")


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    """Output as it was written: with ``text=True`` a bar that is drawn again, after ``\\r``, would be a new line."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=170,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory) -> Path:
    """Enough for three batches."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    with path.open("w") as lines:
        for _ in range(12):
            text = "".join(chr(97 + int(i)) for i in torch.randint(0, 26, (700,), generator=generator))
            lines.write(json.dumps({"text": text}) + "\n")
    return path


def test_as_one_process(run, base: Path, texts_file: Path, tmp_path: Path) -> None:
    arguments = ("-d", texts_file, *DATA, "--target-bits", "5", "--json")
    alone = run("quantize", base, tmp_path / "alone", *arguments)
    assert alone.code == 0
    together = torchrun("-m", "hf_spqr.cli", "quantize", base, tmp_path / "together", *arguments)
    assert together.returncode == 0, together.stderr
    report = json.loads(together.stdout)  # once, and nothing else
    assert report["config"] == alone.json["config"] and report["totals"]["nbytes"] == alone.json["totals"]["nbytes"]
    assert {p.name for p in (tmp_path / "alone").iterdir()} == {p.name for p in (tmp_path / "together").iterdir()}
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "together"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    # one bar that is left behind; it may have been drawn again and again before
    assert len(re.findall(r"Quantizing: 100%[^\r\n]*\n", together.stderr)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "together"}


def test_what_libraries_print_meanwhile_is_no_result(capfd) -> None:
    """Gloo of torch 2.10 says on stdout who is connected, also beside ``--json``."""
    with _stdout_kept_clear():
        os.write(1, b"connected")
    os.write(1, b"{}")
    assert capfd.readouterr() == ("{}", "connected")


def test_a_mistake_is_shown_once(base: Path, tmp_path: Path) -> None:
    result = torchrun("-m", "hf_spqr.cli", "quantize", base, tmp_path / "out", "-d", tmp_path / "nowhere.jsonl")
    assert result.returncode != 0
    assert result.stderr.count("error: The data file") == 1 and "does not exist" in result.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", ["raise ValueError('broken')", "os._exit(3)"], ids=["raises", "dies"])
def test_nothing_is_left_when_a_process_fails(base: Path, texts_file: Path, tmp_path: Path, end: str) -> None:
    """Rank 1 fails when it has quantized some layers."""
    script = tmp_path / "script" / "run.py"
    script.parent.mkdir()
    script.write_text(
        textwrap.dedent(f"""
        import os, sys
        from hf_spqr.cli import main
        from hf_spqr.methods import spqr

        whole, calls = spqr.quantize, []

        def quantize(*arguments):
            calls.append(1)
            if len(calls) == 5 and os.environ["RANK"] == "1":
                {end}
            return whole(*arguments)

        spqr.quantize = quantize
        main(sys.argv[1:])
        """)
    )
    out = tmp_path / "out" / "model"
    result = torchrun(script, "quantize", base, out, "-d", texts_file, *DATA)
    assert result.returncode != 0
    if "raise" in end:
        assert "rank 1: ValueError: broken" in result.stderr
    assert not out.exists() and not list(out.parent.glob(".*"))
