"""Instructions per weight of the kernels for 64-bit ARM, counted under qemu: no time, and nothing about any processor.

    python benchmarks/instructions_arm.py

Needs what tests/cpu/test_arm_emulated.py needs. Each number is the difference between a program that multiplies twice
and one that does so once, so that reading the files and preparing activations are left out. Activations are fp32,
dense weights bf16, and the matrix has 32 rows of 1024 columns. Prints the table of docs/arm.md; takes three minutes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout
from hf_spqr.ops import reference
from tests.cpu import arm
from tests.cuda.emulator import ROOT, Case, Int8Linear
from tests.weights import random_affine, random_spqr

ROWS, COLUMNS, TOKENS, INTEGER_TOKENS = 32, 1024, (1, 4, 16, 64), (1, 16)
WEIGHTS = {
    "spqr 3 g16": random_spqr(SpQRLayout(ROWS, COLUMNS, 3, 16), 0.0),
    "affine 4 g128": random_affine(AffineLayout(ROWS, COLUMNS, 4, 128)),
    "affine 4 g32": random_affine(AffineLayout(ROWS, COLUMNS, 4, 32)),
    "affine 2 g128": random_affine(AffineLayout(ROWS, COLUMNS, 2, 128)),
    "affine 8 per channel": random_affine(AffineLayout(ROWS, COLUMNS, 8, -1)),
}


def single_step() -> str:
    text = subprocess.run([str(arm.QEMU), "-help"], capture_output=True, text=True).stdout
    return "-one-insn-per-tb" if "-one-insn-per-tb" in text else "-singlestep"  # as it was called before qemu 8.1


def executed(program: Path, processor: str, case: Case | Int8Linear, folder: Path) -> int:
    (folder / "in").write_bytes(case.encode())
    trace = [single_step(), "-d", "exec,nochain", "-D", "/dev/stdout"]  # a line for each instruction
    command = [str(arm.QEMU), "-cpu", processor, *trace, str(program), str(folder / "in"), str(folder / "out")]
    count = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            count += line.startswith(b"Trace ")
    assert process.returncode == 0
    return count


def row(weight: spqr.SpQRWeight | affine.AffineWeight, count: Callable[[Callable[[int], Any]], str]) -> list[str]:
    """Of one matrix on one processor; ``count(make)`` counts what the case ``make(times)`` runs each time."""
    x = torch.randn(max(TOKENS), COLUMNS)
    cells = [count(lambda times, t=t: Case(weight, x[:t], seed=times)) for t in TOKENS]
    cells.append(count(lambda times: Case(weight, dtype=torch.bfloat16, seed=times)))
    if isinstance(weight, spqr.SpQRWeight):
        return [*cells, *("–" for _ in INTEGER_TOKENS)]
    for t in INTEGER_TOKENS:
        codes = reference.quantize_activation(x[:t], None, 8, False)
        cells.append(count(lambda times, codes=codes: Int8Linear(weight, *codes, None, torch.float32, seed=times)))
    return cells


def main() -> None:
    if (reason := arm.missing()) is not None:
        raise SystemExit(reason)
    program = arm.build(ROOT / "build" / "emulator")
    titles = [*(f"{t} tokens" for t in TOKENS), "dense", *(f"integers, {t} tokens" for t in INTEGER_TOKENS)]
    print("|  | level | " + " | ".join(titles).replace("1 tokens", "1 token") + " |")
    print("|---" * (len(titles) + 2) + "|")
    with TemporaryDirectory() as folder:
        for name, weight in WEIGHTS.items():
            for processor, level in arm.PROCESSORS.items():

                def count(make: Callable[[int], Any], processor: str = processor) -> str:
                    once, twice = (executed(program, processor, make(times), Path(folder)) for times in (1, 2))
                    return f"{(twice - once) / (ROWS * COLUMNS):.2f}"

                print(f"| {name} | `{level}` | " + " | ".join(row(weight, count)) + " |", flush=True)


if __name__ == "__main__":
    main()
