"""Compiles hf_spqr._C and hf_spqr._C_cuda with torch's cpp_extension, against the torch that is installed.

All else is in pyproject.toml. The extensions use torch's stable ABI (2.10) and Python's (3.10), so one binary serves
every newer version of both. Each file of csrc/cpu that is named after an instruction set gets that set's flags; the
choice is made at run time.

Environment switches, read nowhere else:
  HF_SPQR_SKIP_EXT=1    do not compile; the package then runs through its PyTorch reference
  HF_SPQR_FORCE_EXT=1   fail instead of falling back when something needed for compiling is missing
  HF_SPQR_CUDA=0|1      leave the CUDA kernels out, or insist on them (default: when torch has CUDA and nvcc is found)
  HF_SPQR_CUDA_ARCHS    GPU generations, such as "80;90a;120+PTX" (default: this machine's GPUs, else all we serve)
  HF_SPQR_TORCH_SITE    the site-packages of the torch to compile against (read by _build_backend, which says when)
  MAX_JOBS              compiler processes at a time (default: the number of cores, at most 8)
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "_build_backend"))
import hf_spqr_nvcc as nvcc  # noqa: E402

# An earlier installation of this package may be visible here by its entry point but not by its code.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:  # no torch in the target environment: the wheel has no compiled part
    from setuptools.command.build_ext import build_ext as BuildExtension

    CppExtension = None

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
BF16 = [*AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512bf16"]
X86_FLAGS = {  # by the end of the file name
    "_avx2.cpp": AVX2,
    "_avx512.cpp": AVX512,
    "_vnni.cpp": [*AVX512, "-mavx512vnni", "-mavx512vbmi"],
    "_bf16.cpp": BF16,
    "_amx.cpp": [*BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
ARM_FLAGS = {"_dotprod.cpp": ["-march=armv8.2-a+dotprod"]}
ISA_FLAGS = X86_FLAGS | ARM_FLAGS
MACHINE = platform.machine().lower()
OWN_FLAGS = X86_FLAGS if MACHINE in ("x86_64", "amd64") else ARM_FLAGS if MACHINE in ("aarch64", "arm64") else {}
AMX_PROBE = """#include <immintrin.h>
void probe() { _tile_dpbf16ps(0, 1, 2); _tile_dpbsud(3, 1, 2); _tile_release(); }
"""
# In place of all that a universal Python was compiled for: torch serves one processor.
ARCH_FLAGS = ["-arch", MACHINE] if sys.platform == "darwin" else []
CUDA_SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
CXX_FLAGS = [
    "-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-Wall",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC 12 warns inside its own intrinsics
    "-Wno-unknown-warning-option",  # clang knows only one of them
    "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DPy_LIMITED_API=0x030A0000",
    *ARCH_FLAGS,
]  # fmt: skip


def switch(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def isa_of(source: str) -> str | None:
    return next((suffix for suffix in ISA_FLAGS if source.endswith(suffix)), None)


class BuildWheel(bdist_wheel):
    """Holds and names what was compiled this time: nothing of an earlier build, no platform without kernels."""

    def run(self) -> None:
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        self.run_command("build")
        self.skip_build = True  # a second time
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


class BuildKernels(BuildExtension):
    """Per-file flags, parallel and incremental compilation; falls back to no extension unless told not to."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **({"use_ninja": False} if CppExtension else {}), **kwargs)  # one flag list for all

    def run(self) -> None:
        in_place, wanted, self.built = self.inplace, list(self.extensions), set()
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
        for ext in wanted if in_place else []:
            if ext.name not in self.built:  # what an earlier build left there does not fit this code
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        output = self.get_ext_fullpath(ext.name)
        Path(output).unlink(missing_ok=True)
        newest_header = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.h"))
        jobs = int(os.environ.get("MAX_JOBS", min(os.cpu_count() or 1, 8)))
        # the torch files take longest: first, so that they do not end up alone
        sources = sorted(ext.sources, key=lambda source: "torch" not in source)
        if any(isa_of(source) == "_amx.cpp" for source in sources):
            if self.knows_amx():
                ext.define_macros.append(("HF_SPQR_AMX", None))
            else:
                say("this compiler or assembler does not know AMX: building without its kernels")
                sources = [source for source in sources if isa_of(source) != "_amx.cpp"]
        command = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
        self.made_by = f"{command} {version} torch {torch.__version__}"
        with ThreadPoolExecutor(jobs) as pool:
            cuda = [pool.submit(self.compile_cuda, path, jobs) for path in getattr(ext, "cuda_sources", [])]
            objects = list(pool.map(lambda source: self.compile_one(ext, source, newest_header), sources))
            objects += [task.result() for task in cuda]
        os.makedirs(os.path.dirname(output), exist_ok=True)
        self.compiler.link_shared_object(
            objects, output, libraries=ext.libraries, library_dirs=ext.library_dirs, target_lang="c++",
            extra_postargs=ext.extra_link_args, export_symbols=self.get_export_symbols(ext),
            build_temp=self.build_temp,
        )  # fmt: skip
        self.built.add(ext.name)

    def knows_amx(self) -> bool:
        probe = Path(self.build_temp) / "probe_amx.cpp"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text(AMX_PROBE)
        try:
            flags = [*CXX_FLAGS, *ISA_FLAGS["_amx.cpp"]]
            self.compiler.compile([str(probe)], output_dir=self.build_temp, extra_postargs=flags)
        except CompileError:
            return False
        return True

    def compile_one(self, ext: Extension, source: str, newest_header: float) -> str:
        suffix = isa_of(source)
        (name,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
        flags = [*CXX_FLAGS, *(ISA_FLAGS[suffix] if suffix else [])]
        if Path(source).name.startswith("integer_"):  # the same result to the last bit on every instruction set
            flags.append("-ffp-contract=off")
        made, note = Path(name), Path(f"{name}.flags")
        recipe = f"{self.made_by} {flags} {ext.define_macros} {ext.include_dirs}"
        newer = made.exists() and made.stat().st_mtime > max((ROOT / source).stat().st_mtime, newest_header)
        if newer and note.exists() and note.read_text() == recipe:
            return name
        note.unlink(missing_ok=True)
        self.compiler.compile(
            [source], output_dir=self.build_temp, include_dirs=ext.include_dirs, extra_postargs=flags,
            macros=ext.define_macros,
        )  # fmt: skip
        note.write_text(recipe)
        return name

    def compile_cuda(self, source: Path, jobs: int) -> str:
        threads = max(1, jobs // len(CUDA_SOURCES))
        try:
            return nvcc.compile_cuda(nvcc.cuda_home(), source, ROOT / "csrc", Path(self.build_temp) / "cuda", threads)
        except subprocess.CalledProcessError as error:
            say(f"the CUDA kernels could not be compiled ({error}); on a GPU everything works through the PyTorch "
                "reference, slowly")  # fmt: skip
            raise CompileError(str(error)) from error  # loses this extension only, unless it was asked for


def say(text: str) -> None:
    """On stderr, unless this run is about metadata or a source distribution."""
    if not {"sdist", "egg_info", "dist_info"} & set(sys.argv):
        print(f"hf-spqr: {text}", file=sys.stderr)


def extensions() -> list[Extension]:
    if switch("HF_SPQR_SKIP_EXT"):
        say("compiled kernels skipped on request (HF_SPQR_SKIP_EXT)")
        return []
    problem = None
    if CppExtension is None:
        problem = "torch was not found, install it first (pip install torch)"
    elif tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        problem = f"torch {torch.__version__} is older than 2.10, upgrade it first (pip install --upgrade torch)"
    elif sys.platform == "win32":
        problem = "compiling with MSVC is not supported"
    if problem:
        if switch("HF_SPQR_FORCE_EXT"):
            raise SystemExit(f"hf-spqr: HF_SPQR_FORCE_EXT is set, but {problem}")
        say(f"{problem}: building without compiled kernels. Everything works through the PyTorch reference, slowly.")
        return []
    paths = [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/torch/*_cpu.cpp")]
    sources = [str(path.relative_to(ROOT)) for path in paths]
    sources = [source for source in sources if isa_of(source) in (None, *OWN_FLAGS)]
    ext = CppExtension(
        "hf_spqr._C", sorted(sources), include_dirs=["csrc"], extra_link_args=ARCH_FLAGS, py_limited_api=True
    )
    return [ext, *cuda_extension()]


def cuda_extension() -> list[Extension]:
    wanted = os.environ.get("HF_SPQR_CUDA")
    home = nvcc.cuda_home()
    if wanted == "0" or (wanted is None and torch.version.cuda is None):
        return []
    if home is None:
        if switch("HF_SPQR_CUDA"):
            raise SystemExit("hf-spqr: HF_SPQR_CUDA is set, but no CUDA toolkit was found; set CUDA_HOME")
        say("no CUDA toolkit was found: building without CUDA kernels. On a GPU everything works through the PyTorch "
            "reference, slowly. Install the toolkit or set CUDA_HOME, and reinstall.")  # fmt: skip
        return []
    library = home / ("lib64" if (home / "lib64").exists() else "lib")
    ext = CppExtension(
        "hf_spqr._C_cuda", sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/torch/*_cuda.cpp")),
        include_dirs=["csrc"], library_dirs=[str(library)], define_macros=[("USE_CUDA", None)],
        extra_link_args=nvcc.LINK_FLAGS, py_limited_api=True,
    )  # fmt: skip
    ext.cuda_sources = CUDA_SOURCES
    ext.optional = not (switch("HF_SPQR_CUDA") or switch("HF_SPQR_FORCE_EXT"))
    return [ext]


ext_modules = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": BuildWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
