"""What nvcc makes of the kernels: no spills on any architecture, and few instructions per weight."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.cuda import sass
from tests.cuda.emulator import CSRC

ARCHS = ("80", "86", "89", "90a", "100f", "120f")
FILES = sorted(path.stem for path in CSRC.glob("cuda/*.cu"))
QUICK = {("linear_spqr16", "90a"), ("linear_affine128", "90a")}
WEIGHTS_PER_LANE = 16 * 256 // 32  # of a step, which is one turn of the main loop
# Of the kernel for 1 to 8 tokens, all that the loop may execute with 8 of them: (file, bits, most per weight).
BUDGETS = [("linear_spqr16", 3, 3.0), ("linear_spqr16", 2, 2.85), ("linear_spqr16", 4, 2.85),
           ("linear_affine128", 4, 2.5), ("linear_affine128", 2, 2.55)]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        pytest.param(name, arch, marks=[] if (name, arch) in QUICK else [pytest.mark.slow])
        for name in FILES
        for arch in ARCHS
    ],
)
def test_compiles_without_spills(cubin: Callable, name: str, arch: str) -> None:
    _, log = cubin(name, arch)
    spilled = [line.strip() for line in log.splitlines() if re.search(r"[1-9]\d* bytes spill", line)]
    assert "Used" in log and not spilled, spilled


@pytest.mark.usefixtures("disassembler")
@pytest.mark.parametrize(("name", "bits", "most"), BUDGETS)
def test_instruction_budget(cubin: Callable, name: str, bits: int, most: float) -> None:
    path, _ = cubin(name, "90a")
    code = [body for function, body in sass.functions(path).items() if f"Li{bits}ELi1ELi1ELi8E" in function]
    assert len(code) == 1
    loop = sass.main_loop(code[0])
    per_weight = loop.instructions / WEIGHTS_PER_LANE
    print(f"{name}, {bits} bits: {per_weight:.2f} instructions per weight, {dict(loop.by_name)}")
    assert loop.by_name["HMMA"] >= 16 and not loop.by_name["LDL"] and not loop.by_name["STL"]
    assert per_weight <= most
