"""What benchmarks/kernels_cpu.py stands on: peers that compute the product, results that are kept, tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kernels_cpu_table as tables
import machine
import peers

from hf_spqr.bench.timing import Candidate


def test_torchs_own_4_bit_layer_is_a_right_product() -> None:
    torch.manual_seed(0)
    weight = peers.random_weight(64, 256)
    found, left_out = peers.installed(weight, 1, ("torch_int4",))
    assert [one.name for one in found] == ["torch int4 g128"] and not left_out
    assert found[0].nbytes == 64 * 256 // 2 + 64 * 2 * 4
    assert 0.02 < peers.relative_error(found[0], weight) < 0.15


def test_a_peer_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found, left_out = peers.installed(peers.random_weight(32, 128), 1, ("ggml",))
    assert not found and "llama_cpp" in left_out["ggml"]


def test_a_peer_with_a_wrong_result_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Candidate("wrong", 1, lambda: lambda x: torch.randn(len(x), 32))
    monkeypatch.setattr("peers.torch_int4.candidates", lambda weight, threads: [wrong])
    found, left_out = peers.installed(peers.random_weight(32, 128), 1, ("torch_int4",))
    assert not found and "wrong" in left_out["wrong"]


def test_rounding() -> None:
    weight = torch.randn(8, 64)
    codes, scale, zero = peers.rounded(weight, 4, 32)
    back = (codes.reshape(8, 2, 32) - zero[..., None]) * scale[..., None]
    assert (back.reshape(8, 64) - weight).abs().max() <= scale.max() * 1.01
    assert codes.max() <= 15


def test_settings_that_are_not_measured_again_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    old = [{"shape": [1, 2], "threads": 1, "seconds": 1.0}, {"shape": [1, 2], "threads": 2, "seconds": 2.0}]
    (tmp_path / "x.json").write_text(json.dumps({"rows": old}))
    found = machine.merge("x", [{"shape": [1, 2], "threads": 2, "seconds": 3.0}], ("shape", "threads"))
    assert [row["seconds"] for row in found] == [1.0, 3.0]
    assert "date" in found[1]


def rows() -> list[dict]:
    made = []
    for tokens, threads in ((1, 1), (1, 2), (16, 1)):
        for name, bits, us in (("read", 4, 1), ("torch bf16", 16, 8), ("llama", 4, 4), ("spqr", 4, 2)):
            setting = {"shape": [64, 64], "threads": threads, "tokens": tokens, "name": name}
            nbytes = 64 * 64 * bits // 8
            made.append({**setting, "bytes": nbytes, "seconds": us * 1e-6, "read_bytes_per_second": 2048e6})
    return made


def test_tables() -> None:
    one = tables.batch_one(rows()).splitlines()
    assert one[0] == "|  | bits | 64 × 64, 1 thread | 64 × 64, 2 threads |"
    assert one[2:] == [
        "| spqr | 4.00 | 2 (50%) | 2 (50%) |",
        "| torch bf16 | 16.00 | 8 (50%) | 8 (50%) |",
        "| llama | 4.00 | 4 (25%) | 4 (25%) |",
    ]
    more = tables.more_tokens(rows()).splitlines()
    assert more[2:] == ["| spqr | 4.00 |", "| torch bf16 | 1.00 |", "| llama | 2.00 |"]


def test_the_plot_shows_everyone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tables.draw(rows(), tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
