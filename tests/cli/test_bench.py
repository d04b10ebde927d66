"""``hf-spqr bench`` on small layers."""

from __future__ import annotations

import json

import pytest
import torch

from hf_spqr import ops
from hf_spqr.bench import run as bench_run
from hf_spqr.cli import bench


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "SHAPES", ((64, 256), (96, 256)))
    monkeypatch.setattr(bench, "SECONDS", 0.02)
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.01)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


compiled = pytest.mark.skipif(not ops.COMPILED, reason="needs the compiled kernels")


@compiled
def test_json(run, tmp_path) -> None:
    result = run("bench", "--json", "--threads", 1, "-o", tmp_path / "bench.json")
    assert result.code == 0
    data = result.json
    assert json.loads((tmp_path / "bench.json").read_text()) == data
    assert data["threads"] == torch.get_num_threads() == 1
    names = ["torch bf16", "spqr 3 bit g16 1.0% outliers", "affine 4 bit g128"]
    assert [(row["shape"], row["tokens"], row["name"]) for row in data["layers"]] == [
        (shape, tokens, name) for shape in ([64, 256], [96, 256]) for tokens in (1, 128) for name in names
    ]
    for row in data["layers"]:
        assert row["seconds"] > 0 and row["limit_bytes_per_second"] > 0
        nbytes = row["bits_per_weight"] * row["shape"][0] * row["shape"][1] / 8
        assert row["bytes_per_second"] == pytest.approx(nbytes / row["seconds"])
    assert data["layers"][0]["times_bf16"] == 1 and data["layers"][0]["bits_per_weight"] == 16
    assert [one["model"] for one in data["estimates"]][::3] == ["1B", "3B", "8B", "14B", "32B", "70B"]
    assert data["seconds_per_layer_beside_matrices"] > 0
    fits = [one["weight_bytes"] < data["free_bytes"] for one in data["estimates"]]
    assert fits == [one["fits"] for one in data["estimates"]]


@compiled
def test_text_says_what_is_estimated(run) -> None:
    result = run("bench", "--quick", "--method", "spqr", "--bits", 4, "--group-size", 32, "--outliers", 0)
    assert result.code == 0
    assert "spqr 4 bit g32" in result.out and "affine" not in result.out
    assert "64x256" in result.out and "96x256" not in result.out
    assert "estimate" in result.out and "70B" in result.out and "GB/s" in result.out


@compiled
def test_rounded_activations_are_named(run) -> None:
    data = run("bench", "--quick", "--backend", "int8_activations", "--json").json
    assert [row["name"] for row in data["layers"]][1:3] == [
        "spqr 3 bit g16 1.0% outliers int8_activations",
        "affine 4 bit g128 int8_activations",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", 3), "--method"),
        (("--method", "affine", "--group-size", 7), "group_size"),
        (("--method", "gguf"), "gguf"),
        (("--threads", 0), "threads"),
    ],
)
def test_a_wrong_call(run, arguments: tuple, message: str) -> None:
    result = run("bench", *arguments)
    assert result.code == 2
    assert message in result.err


def test_without_kernels(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "COMPILED", False)
    monkeypatch.setitem(ops.WHY_NOT, "_C", "not built")
    result = run("bench", "--json")
    assert result.code == 1
    assert "not built" in result.json["error"] and "doctor" in result.json["error"]


@compiled
def test_a_folder_that_is_not_there_is_found_before_anything_is_measured(run, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(bench_run, "measure_layers", lambda *a: pytest.fail("measured"))
    result = run("bench", "-o", tmp_path / "none" / "bench.json")
    assert result.code == 1
    assert "does not exist" in result.err


def test_other_devices(run) -> None:
    result = run("bench", "--device", "meta")
    assert result.code == 1
    assert "use cpu, cuda" in result.err
