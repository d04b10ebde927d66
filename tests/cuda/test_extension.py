"""The whole CUDA extension, compiled and linked against the installed torch, which may be a CPU build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.conftest import ROOT, nvcc

SYMBOLS = Path(__file__).with_name("torch_2_10_symbols.txt")
# On a machine without libtorch_cuda.so, this one function of it is enough for the import.
STUB = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 1; }'
IMPORT = """
import sys, importlib.machinery, importlib.util, torch
library = torch.library.Library("hf_spqr", "DEF")
sys.path.insert(0, sys.argv[2])
from hf_spqr.ops.schema import SCHEMAS
names = ["spqr_linear", "spqr_dequantize", "affine_linear", "affine_dequantize", "quantize_activation",
         "w_int8_linear"]
for name in names:
    library.define(name + SCHEMAS[name])
loader = importlib.machinery.ExtensionFileLoader("_C_cuda", sys.argv[1])
loader.exec_module(importlib.util.module_from_spec(importlib.util.spec_from_loader("_C_cuda", loader)))
assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"hf_spqr::{name}", "CUDA") for name in names)
try:
    x = torch.zeros(1, 16)
    i = torch.zeros(1, dtype=torch.int32)
    torch.ops.hf_spqr.affine_linear(x, i, None, None, 16, 4, -1, False, False)
except NotImplementedError:
    print("registered for CUDA only")
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if nvcc.cuda_home() is None or shutil.which("g++") is None:
        pytest.skip("no nvcc or no g++")
    folder = tmp_path_factory.mktemp("extension")
    environment = {**os.environ, "HF_SPQR_CUDA": "1", "HF_SPQR_CUDA_ARCHS": "90a", "HF_SPQR_FORCE_EXT": "1"}
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "hf_spqr" / "_C_cuda.abi3.so"


def lines_of(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_needs_no_cuda_library(extension: Path) -> None:
    """cudart is inside; what there is of CUDA in torch is found through libtorch.so."""
    needed = {line.split("[")[1].rstrip("]") for line in lines_of("readelf", "-d", str(extension)) if "NEEDED" in line}
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "python" in name]


def test_uses_only_symbols_of_torch_2_10(extension: Path) -> None:
    undefined = {line.split()[-1].split("@")[0] for line in lines_of("nm", "-D", "--undefined-only", str(extension))}
    of_torch = {
        name for name in undefined if name.startswith(("aoti_torch", "torch_")) or "c10" in name or "at6" in name
    }
    assert of_torch and of_torch <= set(SYMBOLS.read_text().split())


def test_exports_only_its_init_function(extension: Path) -> None:
    defined = [line.split() for line in lines_of("nm", "-D", "--defined-only", str(extension))]
    assert [name for *_, kind, name in defined if kind == "T" and not name.startswith("_ZN")] == ["PyInit__C_cuda"]


def test_registers_its_ops(extension: Path, tmp_path: Path) -> None:
    (tmp_path / "stub.cpp").write_text(STUB)
    stub = tmp_path / "stub.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "stub.cpp"), "-o", str(stub)], check=True)
    folder = tmp_path / "package"
    (folder / "hf_spqr" / "ops").mkdir(parents=True)  # the schemas without the package, which would register its own
    for name in ("hf_spqr/__init__.py", "hf_spqr/ops/__init__.py"):
        (folder / name).touch()
    shutil.copy(ROOT / "hf_spqr/ops/schema.py", folder / "hf_spqr/ops/schema.py")
    environment = {**os.environ, "LD_PRELOAD": str(stub)}
    command = [sys.executable, "-c", IMPORT, str(extension), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "registered for CUDA only" in done.stdout
