"""Counts the machine instructions of a kernel's main loop with cuobjdump and nvdisasm, which come from PyPI."""

from __future__ import annotations

import collections
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

_FUNCTION = re.compile(r"\s+Function : (\S+)")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_BACKWARD = re.compile(r"BRA(?:\.\w+)*\s+(?:!?U?P\d+,\s*)*(0x[0-9a-f]+)")


class Loop(NamedTuple):
    instructions: int
    by_name: collections.Counter[str]


def cuobjdump() -> Path | None:
    """The tool, from the toolkit or from the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    found = shutil.which("cuobjdump")
    if found and shutil.which("nvdisasm"):
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("cu*/bin/cuobjdump")):
            if path.with_name("nvdisasm").exists():
                return path
    return None


@functools.cache
def functions(cubin: Path) -> dict[str, list[tuple[int, str]]]:
    """Mangled name -> (address, instruction) of every kernel in the file."""
    tool = cuobjdump()
    assert tool is not None
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [str(tool), "--dump-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            name = match[1]
            found[name] = []
        elif name and (match := _INSTRUCTION.match(line)):
            found[name].append((int(match[1], 16), match[2]))
    return found


def until_barrier(code: list[tuple[int, str]]) -> int:
    """Instructions before the first barrier of the block, each counted once."""
    return next(i for i, (_, text) in enumerate(code) if "BAR.SYNC" in text)


def _loops(code: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Every loop, from where a backward branch leads to that branch."""
    found = []
    for address, instruction in code:
        match = _BACKWARD.search(instruction)
        if match and int(match[1], 16) < address:
            found.append([(at, text) for at, text in code if int(match[1], 16) <= at <= address])
    return found


def _tensor(body: list[tuple[int, str]]) -> int:
    return sum("HMMA" in text or "IMMA" in text for _, text in body)


def _main(code: list[tuple[int, str]]) -> list[tuple[int, str]]:
    body = max(_loops(code), key=lambda body: (_tensor(body), -len(body)), default=[])
    assert _tensor(body), "no loop with tensor-core instructions"
    return body


def executed(code: list[tuple[int, str]], turns: int) -> int:
    """Instructions of a turn of the main loop: loops in it that multiply take ``turns`` turns each, others none."""
    main = _main(code)
    inner = [body for body in _loops(main) if body != main]
    return len(main) + sum((turns - 1 if _tensor(body) else -1) * len(body) for body in inner)


def main_loop(code: list[tuple[int, str]]) -> Loop:
    """The smallest loop that holds all tensor-core instructions of any loop."""
    body = _main(code)
    names = (re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for _, text in body)
    return Loop(len(body), collections.Counter(names))
