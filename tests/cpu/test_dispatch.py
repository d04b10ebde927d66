"""The extension on processors that this machine is not, emulated by qemu.

There it must choose the kernels that the processor can run, refuse all others, and compute what it computes here with
the same kernels (which tests/ops holds against float64). An instruction that the emulated processor lacks, in whatever
function the linker put it, ends the process.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_spqr import ops
from hf_spqr.formats import affine, spqr
from tests.ops.cases import affine_case, spqr_case
from tests.ops.conftest import ISAS, available
from tests.ops.test_integer import linear_arguments
from tests.ops.test_kernels import DTYPES, inputs
from tests.weights import random_affine

QEMU = shutil.which("qemu-x86_64")
PROCESSORS = {
    "Nehalem": "scalar",  # SSE4.2
    "IvyBridge": "scalar",  # AVX and F16C, no AVX2
    "Haswell,-fma": "scalar",
    "Haswell,-f16c": "scalar",
    "Haswell": "avx2",
}
PROGRAM = """
import sys
import torch

extension, calls, results, *levels = sys.argv[1:]
torch.ops.load_library(extension)
hf_spqr = torch.ops.hf_spqr
chosen, granted = hf_spqr.cpu_isa(), []
for level in levels:
    try:
        hf_spqr.set_cpu_isa(level)
        granted.append(level)
    except RuntimeError as error:
        assert "this machine has only" in str(error)
made = [getattr(hf_spqr, name)(*arguments) for name, arguments in torch.load(calls)]
torch.save((chosen, granted, hf_spqr.cpu_isa(), made), results)
"""

Call = tuple[str, tuple[Any, ...]]
"""The name of an op and its arguments."""


def linears() -> Iterator[Call]:
    """Products of few tokens, which take no kernel of torch's, and dense weights."""
    cases = [
        *(spqr_case(spqr.SpQRLayout(37, 300, bits, 16), perm=bits == 3) for bits in spqr.BITS),
        spqr_case(spqr.SpQRLayout(37, 300, 3, -1)),
        spqr_case(spqr.SpQRLayout(16, 256, 3, 8, 5, 32)),
        spqr_case(spqr.SpQRLayout(5, 66000), 0.001),  # outliers of 64 bits
        *(affine_case(affine.AffineLayout(37, 300, bits, 64), perm=bits == 3) for bits in affine.BITS),
        affine_case(affine.AffineLayout(20, 100, 4, -1, True, torch.bfloat16)),
    ]
    for case in cases:
        kind = "spqr" if case.linear is ops.spqr_linear else "affine"
        for tokens, dtype in zip((1, 7, 64), DTYPES, strict=True):
            x, bias = inputs(case, tokens, dtype, bias=tokens > 1)
            yield f"{kind}_linear", (x, *case.tensors, bias, case.weight.shape[0], *case.numbers)
            yield f"{kind}_dequantize", (*case.tensors, *case.weight.shape, *case.numbers, dtype)


def integers() -> Iterator[Call]:
    for bits in affine.BITS:
        for group, tokens, dtype in zip((32, -1, 8), (1, 11, 70), DTYPES, strict=True):
            weight = random_affine(affine.AffineLayout(37, 300, bits, group, symmetric=bits == 4), perm=True)
            x, bias = torch.randn(tokens, 300).to(dtype), torch.randn(37).to(dtype)
            quantize = (x, weight.perm, 8, bits == 4)
            yield "quantize_activation", quantize
            yield "w_int8_linear", (*ops.quantize_activation(*quantize), *linear_arguments(weight, bias, dtype))


def emulate(processor: str, calls: list[Call], folder: Path) -> tuple[str, list[str], str, list[Any]]:
    """What PROGRAM saves: the level chosen, the levels granted, the one then used, and the results."""
    torch.save(calls, folder / "calls")
    # OPENBLAS_CORETYPE may ask NumPy for kernels of this machine's own processor
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS")}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    extension = importlib.import_module("hf_spqr._C").__file__
    command = [QEMU, "-cpu", processor, sys.executable, "-c", PROGRAM, extension, folder / "calls", folder / "results"]
    done = subprocess.run([*map(str, command), *ISAS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results")


@pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64 (on Debian and Ubuntu: apt-get install qemu-user)")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="this Python is not a program for x86-64")
@pytest.mark.skipif(not ops.COMPILED, reason="needs the compiled kernels")
@pytest.mark.parametrize(("processor", "level"), PROCESSORS.items())
def test_an_emulated_processor(tmp_path: Path, processor: str, level: str) -> None:
    if level not in available():
        pytest.skip(f"this machine has no {level} to compare with")
    calls = [*linears(), *integers()]
    chosen, granted, used, results = emulate(processor, calls, tmp_path)
    assert chosen == used == level and tuple(granted) == ISAS[: ISAS.index(level) + 1]

    before = torch.ops.hf_spqr.set_cpu_isa(level)
    try:
        expected = [getattr(ops, name)(*arguments) for name, arguments in calls]
    finally:
        torch.ops.hf_spqr.set_cpu_isa(before)
    torch.testing.assert_close(results, expected, rtol=0, atol=0, equal_nan=True)
