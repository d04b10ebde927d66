import importlib.util

import pytest

from hf_spqr.bench import check
from hf_spqr.cli import doctor


def test_json(run) -> None:
    result = run("doctor", "--json")
    assert result.code == 0
    data = result.json
    assert data["ok"] and "hf_spqr" in data["transformers"]["methods"]
    assert data["cpu"]["threads"] >= 1
    compiled = importlib.util.find_spec("hf_spqr._C") is not None
    assert data["kernels"]["compiled"] == compiled
    assert (data["kernels"]["reason"] is None) == (data["kernels"]["level"] is not None) == compiled


def test_text(run) -> None:
    result = run("doctor")
    assert result.code == 0
    assert "kernels" in result.out and "ready" in result.out


def test_knows_the_instructions_of_arm(run, monkeypatch, tmp_path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd crc32 asimddp\nCPU part\t: 0xd40\n")
    monkeypatch.setattr(doctor, "Path", lambda _: info)
    assert run("doctor", "--json").json["cpu"]["isa"] == ["asimd", "asimddp"]


def test_says_why_there_are_no_kernels(run, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "hf_spqr._C" else find(name))
    result = run("doctor")
    assert result.code == 0
    assert "C++20 compiler" in result.out and "reference" in result.out


def test_says_when_autoload_is_off(run, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    data = run("doctor", "--json").json
    assert not data["autoload"]["active"]
    assert any("import hf_spqr" in hint for hint in data["advice"])


def test_a_broken_registration_fails(run, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "registration", lambda: {"registered": False, "methods": [], "reason": "broken"})
    result = run("doctor", "--json")
    assert result.code == 1
    assert "broken" in result.json["advice"][0]


@pytest.mark.skipif(importlib.util.find_spec("hf_spqr._C") is None, reason="needs the compiled kernels")
def test_tries_the_kernels(run) -> None:
    found = run("doctor", "--json").json["tried"]["cpu"]
    assert found["products"] > 100 and found["wrong"] == []


@pytest.mark.skipif(importlib.util.find_spec("hf_spqr._C") is None, reason="needs the compiled kernels")
def test_wrong_kernels_fail(run, monkeypatch) -> None:
    monkeypatch.setattr(check, "check_kernels", lambda device: check.Findings(9, ["a [3 bit]: off by 9%", "b"]))
    result = run("doctor")
    assert result.code == 1
    assert "wrong on cpu (a [3 bit]: off by 9% and 1 more)" in result.out
    assert 'SpQRConfig(backend="reference")' in result.out and "not usable" in result.out


@pytest.mark.skipif(importlib.util.find_spec("hf_spqr._C") is None, reason="needs the compiled kernels")
def test_kernels_that_cannot_run_fail(run, monkeypatch) -> None:
    def fail(device: str) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(check, "check_kernels", fail)
    data = run("doctor", "--json").json
    assert not data["ok"] and data["tried"]["cpu"]["wrong"] == ["RuntimeError: no kernel image is available"]


@pytest.mark.skipif(importlib.util.find_spec("hf_spqr._C") is None, reason="needs the compiled kernels")
@pytest.mark.parametrize(("level", "hints"), [("avx512_bf16", 1), ("amx", 0)])
def test_says_when_amx_lies_idle(run, monkeypatch, level, hints) -> None:
    cpu = {**doctor.cpu(), "isa": [*doctor.ISA_FLAGS]}
    monkeypatch.setattr(doctor, "cpu", lambda: cpu)
    monkeypatch.setattr(doctor, "kernels", lambda: {"compiled": True, "file": "f", "level": level, "reason": None})
    advice = run("doctor", "--json").json["advice"]
    assert sum(f"has AMX, but the kernels use {level}" in hint for hint in advice) == hints
    assert f"using {level}" in run("doctor").out
