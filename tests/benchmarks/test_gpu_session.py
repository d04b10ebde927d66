"""The script for a GPU machine, as far as it can be tried without one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu_session.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def steps(*arguments: str) -> dict[str, tuple[int, str]]:
    done = subprocess.run(["bash", str(SCRIPT), "--dry-run", *arguments], capture_output=True, text=True, check=True)
    fields = [line.split(None, 3) for line in done.stdout.splitlines()]
    return {name: (int(seconds), command) for name, seconds, _, command in fields}


def test_fits_its_time_and_names_files_that_exist() -> None:
    found = steps("--other", ".")
    assert sum(seconds for seconds, _ in found.values()) <= 12 * 60
    words = {word for _, command in found.values() for word in command.split()}
    files = {word.partition("::")[0] for word in words if word.startswith(("benchmarks/", "tests/"))}
    assert len(files) >= 5 and all((ROOT / name).exists() for name in files)


def test_some_steps() -> None:
    assert list(steps("--steps", "tests generate")) == ["tests", "generate"]


@pytest.mark.parametrize("name", ["kernels_cuda", "prompt_cuda", "generate_cuda"])
def test_options_are_known(name: str) -> None:
    """Each command's options are among those of its program."""
    for _, command in steps("--other", ".").values():
        if f"benchmarks/{name}.py" not in command:
            continue
        help_text = subprocess.run(
            [sys.executable, f"benchmarks/{name}.py", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout
        options = {word.partition("=")[0] for word in command.split() if word.startswith("--")}
        assert options and all(option in help_text for option in options), command
