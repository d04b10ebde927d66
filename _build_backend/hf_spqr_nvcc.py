"""Compiles csrc/cuda with nvcc, for setup.py. The .cu files know no torch, so a CPU build of torch will do too."""

import os
import shutil
import subprocess
from pathlib import Path

# A binary for each generation, and PTX that newer ones compile themselves. HF_SPQR_CUDA_ARCHS replaces the list.
RELEASE_ARCHS = "80+PTX;86;89;90a;100f;120f"
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"]
# Its own cudart inside, and libtorch.so named so that the loader finds what it needs of libtorch_cuda.so through it.
LINK_FLAGS = [
    "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-lcudart_static", "-ldl", "-lrt", "-lpthread",
    "-Wl,--exclude-libs,libcudart_static.a",
]  # fmt: skip


def cuda_home() -> Path | None:
    """A toolkit with compiler and headers (a bare nvcc on the PATH may be only a wrapper of another one)."""
    nvcc = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    usual = ["/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)]
    for candidate in [*named, str(Path(nvcc).resolve().parents[1]) if nvcc else None, *usual]:
        home = Path(candidate or "/nowhere")
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def visible_archs() -> str:
    """Those of the GPUs of this machine, empty if there are none."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return ";".join(sorted({line.strip() for line in text.splitlines() if line.strip()[:1].isdigit()}))


def gencodes(archs: str) -> list[str]:
    """nvcc flags of a list such as "80;9.0a;120+PTX"."""
    flags = []
    for item in archs.replace(" ", ";").replace(",", ";").split(";"):
        arch = item.removesuffix("+PTX").replace(".", "")
        if arch:
            flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if arch and item.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


def chosen_gencodes() -> list[str]:
    given = os.environ.get("HF_SPQR_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    return gencodes(given or visible_archs() or RELEASE_ARCHS)


def compile_cuda(home: Path, source: Path, include: Path, folder: Path, threads: int) -> str:
    """The object file of one .cu, compiled unless it is newer than all of csrc/cuda and made for the same targets."""
    flags = [*NVCC_FLAGS, *chosen_gencodes()]
    made, note = folder / f"{source.name}.o", folder / f"{source.name}.flags"
    newest = max(path.stat().st_mtime for path in source.parent.iterdir())
    if made.exists() and made.stat().st_mtime > newest and note.exists() and note.read_text() == " ".join(flags):
        return str(made)
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(home / "bin/nvcc"), *flags, "--threads", str(threads), "-I", str(include)]
    subprocess.run([*command, "-c", str(source), "-o", str(made)], check=True)
    note.write_text(" ".join(flags))
    return str(made)
