"""Compiles the kernels for 64-bit ARM and runs them under qemu, on a processor of one's choice."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.cuda.emulator import CSRC, ROOT, run

COMPILER, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", f"-I{CSRC}"]
"""Those of setup.py that matter here; each source also has those of its name."""
X86 = ("avx2", "avx512", "vnni", "bf16", "amx")
PROCESSORS = {"cortex-a72": "neon", "neoverse-n1": "neon_dotprod"}
"""Names of qemu, and the level whose kernels each must get."""


def missing() -> str | None:
    """Why the program cannot be compiled or run here."""
    if COMPILER is None or QEMU is None:
        return "no cross compiler or no emulator (on Debian: apt-get install g++-aarch64-linux-gnu qemu-user)"
    known = subprocess.run([QEMU, "-cpu", "help"], capture_output=True, text=True).stdout
    unknown = [name for name in PROCESSORS if name not in known]
    return f"{QEMU} is too old: it does not know {unknown[0]}" if unknown else None


def sources() -> list[Path]:
    kernels = [path for path in sorted(CSRC.glob("cpu/*.cpp")) if path.stem.rsplit("_")[-1] not in X86]
    return [*kernels, ROOT / "tests/cpu/arm_main.cpp"]


def flags(source: Path) -> list[str]:
    own = ["-march=armv8.2-a+dotprod"] if source.stem.endswith("_dotprod") else []
    exact = ["-ffp-contract=off"] if source.stem.startswith("integer_") else []
    return [*FLAGS, *own, *exact]


def build(folder: Path) -> Path:
    """The program, compiled unless ``folder`` holds one of the same sources."""
    headers = [*sorted(CSRC.glob("*/*.h")), ROOT / "tests/cpu/weight_case.h"]
    texts = [path.read_bytes() for path in [*sources(), *headers, Path(__file__)]]
    key = hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
    program = folder / f"arm-{key}"
    if program.exists():
        return program
    work = folder / f"{key}-{os.getpid()}"
    work.mkdir(parents=True)

    def compile_one(source: Path) -> None:
        command = [str(COMPILER), *flags(source), "-c", str(source), "-o", str(work / f"{source.name}.o")]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources()))
    linked = work / "arm"
    subprocess.run([str(COMPILER), "-static", *map(str, work.glob("*.o")), "-o", str(linked)], check=True)
    return linked.rename(program)


def level(program: Path, processor: str) -> str:
    """The kernels that ``processor`` gets."""
    command = [str(QEMU), "-cpu", processor, str(program)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run_on(program: Path, processor: str, cases: Sequence[Any], folder: Path) -> list[Any]:
    return run(program, cases, folder, through=[str(QEMU), "-cpu", processor])
