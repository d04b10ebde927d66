"""The emulator finds accesses to shared memory that no barrier orders, and only those."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda import emulator


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = emulator.compiler()
    if compiler is None:
        pytest.skip("no g++")
    target = tmp_path_factory.mktemp("races") / "races"
    source = Path(__file__).with_name("races.cpp")
    subprocess.run([compiler, *emulator.FLAGS, "-x", "c++", str(source), "-o", str(target)], check=True)
    return target


def report(program: Path, kind: int) -> tuple[int, str]:
    environment = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    done = subprocess.run([str(program), str(kind)], capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr


@pytest.mark.parametrize("kind", [0, 8])
def test_barriers_order(program: Path, kind: int) -> None:
    status, text = report(program, kind)
    assert status == 0, text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (1, "written by thread"), (2, "written by thread"), (3, "read by thread"), (4, "still being copied"),
        (5, "no barrier"), (6, "written by thread"), (7, "written by thread"), (9, "no barrier"),
        (10, "ends without"),
    ],
)  # fmt: skip
def test_mistake_is_found(program: Path, kind: int, words: str) -> None:
    status, text = report(program, kind)
    assert status != 0 and "race: thread" in text and words in text, text
