"""What the compiler made of the AMX kernels for the real instructions, and the ops through emulated ones."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu import emulated
from tests.cuda.emulator import ROOT, compiler

INSTRUCTIONS = {"ldtilecfg", "tileloadd", "tilestored", "tilezero", "tdpbf16ps", "tdpbsud", "tilerelease"}


def compiles_amx() -> bool:
    command = [compiler() or "false", "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not compiles_amx(), reason="no compiler that knows AMX")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_the_extension_has_the_instructions() -> None:
    spec = importlib.util.find_spec("hf_spqr._C")
    if spec is None or spec.origin is None:
        pytest.skip("not compiled")
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", spec.origin], capture_output=True, text=True)
    assert set(re.findall(r"\t(ldtile\w+|tile\w+|tdp\w+)", listing.stdout)) >= INSTRUCTIONS


@pytest.mark.slow
def test_ops_with_emulated_tiles(tmp_path: Path) -> None:
    """Every op test on the level `amx`, its choice of kernels included, through an extension of its own."""
    if (reason := emulated.missing()) is not None:
        pytest.skip(reason)
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("build", "out", "dist", "shared", ".*", "*.so"))
    environment = {
        **os.environ, "CFLAGS": "-DHF_SPQR_EMU_AMX", "CXXFLAGS": "-DHF_SPQR_EMU_AMX", "HF_SPQR_CUDA": "0",
        "HF_SPQR_FORCE_EXT": "1", "PYTHONPATH": str(tree),
    }  # fmt: skip
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tree, env=environment, check=True, capture_output=True)
    tests = [sys.executable, "-m", "pytest", "-p", "no:xdist", "tests/ops", "-k", "amx"]
    done = subprocess.run(tests, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"[1-9]\d* passed", done.stdout), done.stdout[-4000:]
