"""Compiles the AMX kernels with csrc/emu/amx.h in place of the instructions, under AddressSanitizer and UBSan."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cuda.emulator import CSRC, ROOT, compiler

KERNELS = ("prompt", "prepare", "integer")
SOURCES = [*(CSRC / f"cpu/{name}_amx.cpp" for name in KERNELS), ROOT / "tests/cpu/amx_main.cpp"]
NEEDED = "avx512f avx512bw avx512vl avx512dq avx512_vnni avx512vbmi avx512_bf16".split()
"""Beside the tiles the kernels are made of ordinary AVX-512, as /proc/cpuinfo names it, which is not emulated."""
FLAGS = ["-std=c++20", "-O1", "-g1", "-DHF_SPQR_EMU_AMX", "-ffp-contract=off", f"-I{CSRC}", "-mavx2", "-mfma",
         "-mf16c", *(f"-m{name.replace('_', '')}" for name in NEEDED), "-Wno-psabi",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]  # fmt: skip


def missing() -> str | None:
    """Why the program cannot be compiled or run here."""
    if compiler() is None:
        return "no g++"
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", info.read_text() if info.is_file() else "", re.MULTILINE)
    absent = set(NEEDED) - set(flags[1].split() if flags else [])
    return f"the processor lacks {' '.join(sorted(absent))}" if absent else None


def build(folder: Path) -> Path:
    """The program, compiled unless ``folder`` holds one of the same sources."""
    places = (CSRC / "cpu", CSRC / "emu", ROOT / "tests/cpu")
    headers = [path for place in places for path in sorted(place.glob("*.h"))]
    texts = [path.read_bytes() for path in [*SOURCES, *headers]]
    key = hashlib.sha256(b"\0".join([*texts, " ".join(FLAGS).encode()])).hexdigest()[:16]
    program = folder / f"amx-{key}"
    if program.exists():
        return program
    work = folder / f"{key}-{os.getpid()}"
    work.mkdir(parents=True)

    def run(*arguments: object) -> None:
        subprocess.run([str(compiler()), *FLAGS, *map(str, arguments)], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: run("-c", source, "-o", work / f"{source.name}.o"), SOURCES))
    run(*work.glob("*.o"), "-o", work / "amx")
    return (work / "amx").rename(program)
