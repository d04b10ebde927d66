"""The commands and snippets of the pages are understood, and those that need nothing more run as printed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from hf_spqr.cli import app, main
from tests.test_docs import FENCE, PAGES, ROOT, prose

COMMAND = re.compile(r"(?:torchrun [^\n]*--no-python |optimum-cli )?hf-spqr (.*)")
PLACEHOLDER = re.compile(r"\b(MODEL|OUT|BASE|COMMAND|FOLDER|REPO)\b")
RUN = ("quantize", "eval", "inspect", "export", "convert", "doctor")
NOT_HERE = ("torch.compile", "distributed", '"cuda"', "set_cpu_isa", "SentenceTransformer")
"""In snippets: takes minutes, or needs processes, a GPU, a kernel level that lasts as long as the process, or a model
of the Hub."""


def lines(text: str) -> Iterator[str]:
    """The lines of a block, continued ones as one."""
    yield from (line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines())


def commands(page: Path) -> list[list[str]]:
    """The words after ``hf-spqr`` of every command on a page, in blocks and in the text."""
    blocks = [line for _, code in FENCE.findall(page.read_text(encoding="utf-8")) for line in lines(code)]
    inline = [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]
    found = [COMMAND.match(line) for line in (*blocks, *inline)]
    return [shlex.split(re.split(r" [>|] ", match[1])[0], comments=True) for match in found if match]


def helps() -> Iterator[list[str]]:
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        for line in lines(command.help or ""):
            if match := COMMAND.match(line):
                yield shlex.split(re.split(r" [>|] ", match[1])[0])


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line takes these words; what the command does is left out."""
    group: Any = typer.main.get_command(app)
    if words[0] in group.commands and words[1:] and words[1][0] == "-":  # in the text, of any model
        arguments = [one for one in group.commands[words[0]].params if not one.opts[0].startswith("-")]
        words = [words[0], *("x" for _ in arguments), *words[1:]]
    for command in group.commands.values():
        monkeypatch.setattr(command, "callback", lambda **options: None)
    with pytest.raises(SystemExit) as stop:
        group.main(words, prog_name="hf-spqr")
    assert not stop.value.code, words


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_command_lines_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands(page):
        if words[0] != "COMMAND" and (len(words) > 1 or words[0] == "--version"):  # not a command's mere name
            check(words, monkeypatch)


def test_examples_of_the_help_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = list(helps())
    assert len(examples) > 15
    for words in examples:
        check(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_exist_and_have_these_options(page: Path) -> None:
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    for name, arguments in re.findall(r"python (?:-m benchmarks\.|benchmarks/)(\w+)(?:\.py)?([^`\n#]*)", text):
        source = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
        options = re.findall(r"--\w[\w-]*", arguments)
        assert [option for option in options if f'"{option}"' not in source] == [], name
    paths = re.findall(r"pytest (tests/[\w/.]+)", text) + re.findall(r"`((?:csrc|tests|benchmarks)/[\w/.]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def made_elsewhere(page: Path) -> list[list[str]]:
    """The command of README.md that makes out/demo, for pages that take it as made."""
    text, making = page.read_text(encoding="utf-8"), ["quantize", "examples/demo-model", "out/demo"]
    if "out/demo" not in text or " ".join(making) in text:
        return []
    return [next(words for words in commands(ROOT / "README.md") if words[:3] == making)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the demo model and the beginnings of its texts, in which commands run."""
    examples = tmp_path / "examples"
    examples.mkdir()
    (examples / "demo-model").symlink_to(ROOT / "examples/demo-model")
    for name in ("demo-calibration.jsonl", "demo-heldout.jsonl"):
        text = (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (examples / name).write_text("".join(text[:6]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["README", "getting-started", "cli", "transformers", "omniquant", "cpu", "distributed", "interoperability"]
)
def test_a_page_runs_as_printed(name: str, folder: Path) -> None:
    page = next(page for page in PAGES if page.stem == name)
    known: dict[str, Any] = {}
    for words in made_elsewhere(page):
        run(words)
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python" and not any(word in code for word in NOT_HERE):
            if "peft" in code:
                pytest.importorskip("peft")
            exec(compile(code, name, "exec"), known)
        for line in lines(code) if not language else ():
            match = re.match("hf-spqr (.*)", line)
            words = shlex.split(match[1], comments=True) if match else [""]
            if words[0] in RUN and not PLACEHOLDER.search(line) and "--tasks" not in words and is_here(words[1:]):
                run(words)


def is_here(arguments: list[str]) -> bool:
    """Whether the model comes from the project, or from a command before, and not from the Hub."""
    return not arguments or arguments[0].startswith(("-", "examples/", "out/"))


def run(words: list[str]) -> None:
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    if words[-1] == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code, words
