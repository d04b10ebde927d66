"""The build's choice of toolkit and GPU generations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.conftest import nvcc


def test_gencodes() -> None:
    assert nvcc.gencodes("8.0;9.0a, 120+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_named_archs_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "visible_archs", lambda: "8.6")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("HF_SPQR_CUDA_ARCHS", raising=False)
    assert nvcc.chosen_gencodes() == nvcc.gencodes("86")
    monkeypatch.setenv("HF_SPQR_CUDA_ARCHS", "90a")
    assert nvcc.chosen_gencodes() == nvcc.gencodes("90a")


def test_without_gpu_all_that_we_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "visible_archs", lambda: "")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("HF_SPQR_CUDA_ARCHS", raising=False)
    assert nvcc.chosen_gencodes() == nvcc.gencodes(nvcc.RELEASE_ARCHS)


def test_a_toolkit_has_compiler_and_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc.cuda_home() != tmp_path  # a wrapper only
    (tmp_path / "include").mkdir()
    (tmp_path / "include/cuda_runtime.h").touch()
    assert nvcc.cuda_home() == tmp_path
