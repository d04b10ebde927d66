"""What nvcc makes of the kernels: no spills, and few instructions per weight."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.cuda import sass
from tests.cuda.emulator import CSRC

ARCHS = ("80", "86", "89", "90a", "100f", "120f")
FILES = sorted(path.stem for path in CSRC.glob("cuda/*.cu"))
QUICK = {("linear_spqr16", "90a"), ("linear_affine128", "90a"), ("tiled_spqr16", "90a"),
         ("resident_affine64", "90a")}  # fmt: skip
WEIGHTS_PER_LANE = 16 * 256 // 32  # of a step of one row block; a step is one turn of the main loop
# Of the kernel for 1 to 8 tokens, with all that its loop holds for 8 of them: (file, bits, most per weight).
BUDGETS = [
    ("linear_spqr16", 3, 3.0),
    ("linear_spqr16", 2, 2.85),
    ("linear_spqr16", 4, 2.85),
    ("linear_affine128", 4, 1.8),
    ("linear_affine128", 2, 1.75),
    ("linear_affine64", 4, 2.85),
    ("linear_affine32", 3, 3.6),
]
# Of resident.cuh, likewise.
RESIDENT_BUDGETS = [
    ("resident_spqr16", 3, 2.8),
    ("resident_spqr16", 2, 2.65),
    ("resident_spqr16", 4, 2.65),
    ("resident_affine128", 4, 1.8),
    ("resident_affine128", 2, 1.7),
    ("resident_affine64", 4, 2.5),
    ("resident_affine64", 3, 3.2),
    ("resident_affine64", 2, 2.55),
    ("resident_affine32", 4, 2.6),
]
# Of tiled.cuh for 64 tokens, with all that a step of two row blocks takes, its outliers but for rows of more than six.
TILED_BUDGETS = [
    ("tiled_spqr16", 3, 7.1),
    ("tiled_spqr16", 2, 6.9),
    ("tiled_spqr16", 4, 6.9),
    ("tiled_affine128", 4, 5.25),
    ("tiled_affine128", 2, 5.25),
    ("tiled_affine64", 4, 4.9),
    ("tiled_affine64", 2, 4.95),
    ("tiled_affine32", 3, 5.75),
]
DENSE_WEIGHTS_PER_THREAD = 64


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
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill stores", log)]
    assert "Used" in log and spilled
    assert sum(spilled) == 0, [line for line in log.splitlines() if "spill" in line]


QUICK_OVERLAP = [("kernels", "90a"), ("resident_spqr16", "90a"), ("tiled_spqr16", "90a"), ("tiled_affine64", "120f")]


@pytest.mark.usefixtures("disassembler")
@pytest.mark.parametrize(
    ("name", "arch"),
    [
        pytest.param(name, arch, marks=[] if (name, arch) in QUICK_OVERLAP else [pytest.mark.slow])
        for name in FILES
        if name.startswith(("kernels", "resident", "tiled"))
        for arch in ("90a", "100f", "120f")
    ],
)
def test_memory_waits_for_the_kernel_before(cubin: Callable, name: str, arch: str) -> None:
    """Kernels that start while another one ends touch global memory only when it has ended."""
    waiting = 0
    for function, code in sass.functions(cubin(name, arch)[0]).items():
        waits = [i for i, (_, text) in enumerate(code) if "ACQBULK" in text]
        touches = [i for i, (_, text) in enumerate(code) if re.search(r"\b(LDG|LDGSTS|STG|ATOMG|REDG?)\b", text)]
        assert not waits or waits[0] < touches[0], function
        waiting += len(waits)
    assert waiting


@pytest.mark.usefixtures("disassembler")
@pytest.mark.parametrize(("name", "bits", "most"), BUDGETS)
def test_instruction_budget(cubin: Callable, name: str, bits: int, most: float) -> None:
    path, _ = cubin(name, "90a")
    kernels = {}  # row blocks of a warp -> code
    for function, body in sass.functions(path).items():
        if match := re.search(
            rf"ELi{bits}ELi1ELi(\d)ELi1ELi8E", function
        ):  # bits, token tiles, row blocks, width, slices
            kernels[int(match[1])] = body
    ((row_blocks, code),) = kernels.items()
    loop = sass.main_loop(code)
    per_weight = loop.instructions / (WEIGHTS_PER_LANE * row_blocks)
    print(f"{name}, {bits} bits: {per_weight:.2f} instructions per weight, {dict(loop.by_name)}")
    assert loop.by_name["HMMA"] >= 16 and not loop.by_name["LDL"] and not loop.by_name["STL"]
    assert per_weight <= most


@pytest.mark.usefixtures("disassembler")
@pytest.mark.parametrize(("name", "bits", "most"), RESIDENT_BUDGETS)
def test_instruction_budget_of_resident(cubin: Callable, name: str, bits: int, most: float) -> None:
    path, _ = cubin(name, "90a")
    pattern = rf"linear_resident_kernel\w+ELi{bits}ELi1EEEv"  # bits, token tiles
    (code,) = (body for function, body in sass.functions(path).items() if re.search(pattern, function))
    loop = sass.main_loop(code)
    per_weight = loop.instructions / WEIGHTS_PER_LANE
    print(f"{name}, {bits} bits: {per_weight:.2f} instructions per weight, {dict(loop.by_name)}")
    assert loop.by_name["HMMA"] >= 16 and not loop.by_name["LDL"] and not loop.by_name["STL"]
    assert per_weight <= most


@pytest.mark.usefixtures("disassembler")
@pytest.mark.parametrize(("name", "bits", "most"), TILED_BUDGETS)
def test_instruction_budget_of_tiled(cubin: Callable, name: str, bits: int, most: float) -> None:
    path, _ = cubin(name, "90a")
    pattern = rf"tiled_kernel\w+ELi{bits}ELi8ELb"  # bits, token tiles, outliers
    (code,) = (body for function, body in sass.functions(path).items() if re.search(pattern, function))
    loop = sass.main_loop(code)
    per_weight = sass.executed(code, turns=4) / (2 * WEIGHTS_PER_LANE)
    print(f"{name}, {bits} bits: {per_weight:.2f} instructions per weight of 64 tokens, {dict(loop.by_name)}")
    assert loop.by_name["HMMA"] == 64 and not loop.by_name["LDL"] and not loop.by_name["STL"]
    assert per_weight <= most


@pytest.mark.usefixtures("disassembler")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_instruction_budget_of_dequantize(cubin: Callable, bits: int) -> None:
    """Of SpQR's usual layout: all until dense weights lie in shared memory."""
    path, _ = cubin("kernels", "90a")
    name = f"dequantize_kernelINS_16DenseStatsSpqr16ELi{bits}E"
    (code,) = (body for function, body in sass.functions(path).items() if name in function)
    per_weight = sass.until_barrier(code) / DENSE_WEIGHTS_PER_THREAD
    print(f"dequantize, {bits} bits: {per_weight:.2f} instructions per weight")
    assert per_weight <= 8.75


@pytest.mark.slow
@pytest.mark.usefixtures("disassembler")
def test_half_bytes_are_multiplied_by_int4_cores_or_not_at_all(cubin: Callable) -> None:
    """Of 128 x 128: one mma for two of int8, and words of the weights are operands as they are."""
    name = "int8_many_kernelINS_9HalfBytesELi4ELi8ELi2ELi2ELi2E"
    (code,) = (body for function, body in sass.functions(cubin("int4", "80")[0]).items() if name in function)
    loop = sass.main_loop(code)
    print(f"{loop.instructions} instructions for 256 columns, {dict(loop.by_name)}")
    assert {text.split()[0] for _, text in code if "IMMA" in text} == {"IMMA.16864.U4.S4"}
    assert loop.by_name["IMMA"] == 128 and not loop.by_name["LDL"] and not loop.by_name["STL"]
    assert loop.instructions <= 800
    (code,) = (body for function, body in sass.functions(cubin("int4", "90a")[0]).items() if name in function)
    assert not any("IMMA" in text or "LDG" in text for _, text in code)


@pytest.mark.usefixtures("disassembler")
@pytest.mark.parametrize(("name", "bits", "most"), [("int8_few_bits", 4, 1.85), ("int8_bytes", 8, 1.85)])
def test_instruction_budget_of_integers(cubin: Callable, name: str, bits: int, most: float) -> None:
    """Of the kernel for 1 to 8 tokens and one scale per row."""
    path, _ = cubin(name, "90a")
    (code,) = (body for function, body in sass.functions(path).items() if f"channel_kernelILi{bits}ELi1E" in function)
    loop = sass.main_loop(code)
    per_weight = loop.instructions / WEIGHTS_PER_LANE
    print(f"{name}, {bits} bits: {per_weight:.2f} instructions per weight, {dict(loop.by_name)}")
    assert loop.by_name["IMMA"] >= 24 and not loop.by_name["LDL"] and not loop.by_name["STL"]
    assert per_weight <= most
