"""Tools that the CUDA tests need; a test is skipped where its tool is absent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cuda import emulator, sass

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "_build_backend"))
import hf_spqr_nvcc as nvcc  # noqa: E402


@pytest.fixture(scope="session")
def run_emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """``run(cases) -> results`` on the kernels compiled for the host."""
    if emulator.compiler() is None:
        pytest.skip("no g++")
    program = emulator.build(ROOT / "build" / "emulator")
    folder = tmp_path_factory.mktemp("emulator")
    return lambda cases: emulator.run(program, cases, folder)


@pytest.fixture(scope="session")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, str]]:
    """``cubin(name, arch)`` compiles csrc/cuda/name.cu and returns the file and what ptxas says of each kernel."""
    home = nvcc.cuda_home()
    if home is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("cubin")
    made: dict[tuple[str, str], tuple[Path, str]] = {}

    def compile_for(name: str, arch: str) -> tuple[Path, str]:
        if (name, arch) not in made:
            target = folder / f"{name}.{arch}.cubin"
            flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-I", str(ROOT / "csrc"), *nvcc.gencodes(arch), "-cubin"]
            command = [str(home / "bin/nvcc"), *flags, str(ROOT / f"csrc/cuda/{name}.cu"), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            made[name, arch] = target, done.stderr
        return made[name, arch]

    return compile_for


@pytest.fixture(scope="session")
def disassembler() -> None:
    if sass.cuobjdump() is None:
        pytest.skip("no cuobjdump and nvdisasm; pip install -e .[sass]")
