"""Source distribution and wheels, made as pip makes them; where compiling matters, by a stand-in for the compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns("build", "dist", "out", "shared", "*.egg-info", "__pycache__", "*.so", ".[!c]*")
ONLY_IN_GIT = (".ci",)
HOOK = """
import sys
sys.path.insert(0, "_build_backend")
import hf_spqr_build
print(getattr(hf_spqr_build, sys.argv[1])(sys.argv[2]))
"""
COMPILER = """#!/bin/sh
case "$*" in
    *--version*) cat {folder}/version; exit;;
esac
echo "$*" >>{folder}/calls
test -e {folder}/broken && exit 1
while [ $# -gt 0 ]; do
    test "$1" = -o && touch "$2"
    shift
done
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return shutil.copytree(ROOT, tmp_path / "a checkout", ignore=NOT_COPIED)


def build(tree: Path, hook: str, into: str = "dist", **environment: str) -> tuple[Path, str]:
    """The file that the hook of the build backend made, and what it said."""
    folder = tree.parent / into
    folder.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_SPQR_", "CFLAGS", "CXX"))}
    variables = {**clean, "HF_SPQR_CUDA": "0", **environment}
    command = [sys.executable, "-c", HOOK, hook, str(folder)]
    done = subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / done.stdout.splitlines()[-1], done.stderr


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_sdist_is_the_whole_checkout(tree: Path) -> None:
    files = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    (tree / "hf_spqr" / "_C.abi3.so").touch()
    sdist, said = build(tree, "build_sdist", HF_SPQR_SKIP_EXT="1")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    assert {name for name in files - inside if not name.startswith(ONLY_IN_GIT)} == set()
    assert {name for name in inside - files if ".egg-info/" not in name} == {"PKG-INFO", "setup.cfg"}
    assert "hf-spqr:" not in said  # nothing is compiled, so there is nothing to say about it


def test_wheel_without_kernels_fits_any_platform(tree: Path) -> None:
    wheel, said = build(tree, "build_wheel", HF_SPQR_SKIP_EXT="1")
    assert wheel.name.endswith("-py3-none-any.whl") and "skipped on request" in said
    inside = contents(wheel)
    assert {name.partition("/")[0].partition("-")[0] for name in inside} == {
        "hf_spqr", "hf_spqr_autoload.py", "optimum"
    }  # fmt: skip
    needed = {"hf_spqr/py.typed", "hf_spqr/report/card.md.j2", "optimum/commands/register/hf_spqr.py"}
    assert needed <= set(inside) and any(name.endswith("licenses/LICENSE") for name in inside)
    packages = {str(path.relative_to(tree)) for path in (tree / "hf_spqr").rglob("*.py")}
    assert packages == {name for name in inside if name.startswith("hf_spqr/") and name.endswith(".py")}


class StandIn:
    """A compiler that makes empty files and notes its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program = folder / "compiler"
        program.write_text(COMPILER.format(folder=folder))
        program.chmod(0o755)
        self.environment = {"CC": str(program), "CXX": str(program), "MAX_JOBS": "2"}
        self.is_version("stand-in 12.2.0")

    def is_version(self, text: str) -> None:
        (self.folder / "version").write_text(text)

    def breaks(self) -> None:
        (self.folder / "broken").touch()

    def compiled(self) -> set[str]:
        """Sources of csrc compiled since the last question."""
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return {word for line in lines for word in line.split() if word.startswith("csrc/") and word.endswith(".cpp")}


@pytest.fixture
def compiler(tmp_path: Path) -> StandIn:
    pytest.importorskip("torch.utils.cpp_extension")
    return StandIn(tmp_path)


def test_kernels_are_compiled_again_only_where_something_changed(tree: Path, compiler: StandIn) -> None:
    wheel, _ = build(tree, "build_wheel", **compiler.environment)
    assert wheel.name.endswith(f"-cp310-abi3-{sysconfig.get_platform().replace('-', '_')}.whl")
    assert "hf_spqr/_C.abi3.so" in contents(wheel)
    everything = compiler.compiled()
    assert {"csrc/cpu/isa.cpp", "csrc/torch/ops_cpu.cpp"} <= everything

    wheel, _ = build(tree, "build_wheel", **compiler.environment)
    assert compiler.compiled() == set() and "hf_spqr/_C.abi3.so" in contents(wheel)

    later = time.time() + 10_000  # than what was compiled just now
    os.utime(tree / "csrc/cpu/isa.cpp", (later, later))
    build(tree, "build_wheel", **compiler.environment)
    assert compiler.compiled() == {"csrc/cpu/isa.cpp"}

    compiler.is_version("stand-in 13.1.0")  # may know instructions that the old one did not
    build(tree, "build_wheel", **compiler.environment)
    assert compiler.compiled() == everything


def test_builds_of_one_checkout_wait_for_each_other(tree: Path, compiler: StandIn) -> None:
    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(build, tree, "build_wheel", f"dist{i}", **compiler.environment) for i in range(2)]
        first, second = (contents(build.result()[0]) for build in builds)
    assert sorted(first) == sorted(second) and {"hf_spqr/_C.abi3.so", "hf_spqr/report/card.md.j2"} <= set(first)


def test_what_cannot_be_compiled_is_not_taken_from_an_earlier_build(tree: Path, compiler: StandIn) -> None:
    build(tree, "build_wheel", **compiler.environment)
    compiler.is_version("stand-in 13.1.0")
    compiler.breaks()
    wheel, said = build(tree, "build_wheel", **compiler.environment)
    assert "could not be built" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in contents(wheel) if name.endswith(".so") or ".data/" in name]


def test_in_place_kernels_of_an_earlier_build_go_too(tree: Path, compiler: StandIn) -> None:
    build(tree, "build_editable", **compiler.environment)
    kernels = tree / "hf_spqr" / "_C.abi3.so"
    assert kernels.exists()
    compiler.is_version("stand-in 13.1.0")
    compiler.breaks()
    _, said = build(tree, "build_editable", **compiler.environment)
    assert "could not be built" in said and not kernels.exists()


def test_torch_is_found_in_the_environment_that_uv_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv builds with VIRTUAL_ENV set to an environment of its own; the active one is still on the PATH."""
    (tmp_path / "pyvenv.cfg").touch()
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join(["/usr/bin", str(tmp_path / "bin")]))
    monkeypatch.syspath_prepend(ROOT / "_build_backend")
    backend = pytest.importorskip("hf_spqr_build")
    folder = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    assert str(tmp_path / "lib" / folder / "site-packages") in list(backend._candidates())
    assert str(ROOT / ".venv" / "lib" / folder / "site-packages") in list(backend._candidates())
