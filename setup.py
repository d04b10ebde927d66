"""Compiles hf_spqr._C with torch's cpp_extension, against the torch that is installed; all else is in pyproject.toml.

The extension uses torch's stable ABI (2.10) and Python's (3.10), so one binary serves every newer version of both.
Each file of csrc/cpu that is named after an instruction set gets that set's flags; the choice is made at run time.

Environment switches, read nowhere else:
  HF_SPQR_SKIP_EXT=1    do not compile; the package then runs through its PyTorch reference
  HF_SPQR_FORCE_EXT=1   fail instead of falling back when something needed for compiling is missing
  MAX_JOBS              compiler processes at a time (default: the number of cores, at most 8)
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:  # no torch in the target environment: the wheel has no compiled part
    from setuptools.command.build_ext import build_ext as BuildExtension

    CppExtension = None

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
ISA_FLAGS = {  # by the end of the file name
    "_avx2.cpp": AVX2,
    "_avx512.cpp": AVX512,
    "_vnni.cpp": [*AVX512, "-mavx512vnni", "-mavx512vbmi"],
    "_bf16.cpp": [*AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512bf16"],
}
CXX_FLAGS = [
    "-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-Wall",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC 12 warns inside its own intrinsics
    "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DPy_LIMITED_API=0x030A0000",
]  # fmt: skip


def switch(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def isa_of(source: str) -> str | None:
    return next((suffix for suffix in ISA_FLAGS if source.endswith(suffix)), None)


class BuildKernels(BuildExtension):
    """Per-file flags, parallel and incremental compilation; falls back to no extension unless told not to."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **({"use_ninja": False} if CppExtension else {}), **kwargs)  # one flag list for all

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # whatever went wrong with a compiler, the package works without it
            if switch("HF_SPQR_FORCE_EXT"):
                raise
            say(
                f"the compiled kernels could not be built ({error}). Installing without them: everything works "
                "through the PyTorch reference, slowly. Install a C++20 compiler and reinstall to have them."
            )
            self.extensions.clear()

    def build_extension(self, ext: Extension) -> None:
        newest_header = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.h"))
        jobs = int(os.environ.get("MAX_JOBS", min(os.cpu_count() or 1, 8)))
        # the torch files take longest: first, so that they do not end up alone
        sources = sorted(ext.sources, key=lambda source: "torch" not in source)
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda source: self.compile_one(ext, source, newest_header), sources))
        output = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(output), exist_ok=True)
        self.compiler.link_shared_object(
            objects, output, libraries=ext.libraries, library_dirs=ext.library_dirs, target_lang="c++",
            export_symbols=self.get_export_symbols(ext), build_temp=self.build_temp,
        )  # fmt: skip

    def compile_one(self, ext: Extension, source: str, newest_header: float) -> str:
        suffix = isa_of(source)
        (name,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
        made = Path(name)
        if made.exists() and made.stat().st_mtime > max((ROOT / source).stat().st_mtime, newest_header):
            return name
        flags = [*CXX_FLAGS, *(ISA_FLAGS[suffix] if suffix else [])]
        self.compiler.compile(
            [source], output_dir=self.build_temp, include_dirs=ext.include_dirs, extra_postargs=flags
        )
        return name


def say(text: str) -> None:
    print(f"hf-spqr: {text}", file=sys.stderr)


def extensions() -> list[Extension]:
    if switch("HF_SPQR_SKIP_EXT"):
        say("compiled kernels skipped on request (HF_SPQR_SKIP_EXT)")
        return []
    problem = None
    if CppExtension is None:
        problem = "torch was not found, install it first (pip install torch)"
    elif sys.platform == "win32":
        problem = "compiling with MSVC is not supported"
    if problem:
        if switch("HF_SPQR_FORCE_EXT"):
            raise SystemExit(f"hf-spqr: HF_SPQR_FORCE_EXT is set, but {problem}")
        say(f"{problem}: building without compiled kernels. Everything works through the PyTorch reference, slowly.")
        return []
    paths = [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/torch/*_cpu.cpp")]
    sources = [str(path.relative_to(ROOT)) for path in paths]
    if not X86:
        sources = [source for source in sources if isa_of(source) is None]
    return [CppExtension("hf_spqr._C", sorted(sources), include_dirs=["csrc"], py_limited_api=True)]


ext_modules = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
