import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import typer

from hf_spqr.cli import COMMANDS, app, main


def subcommand(name: str) -> Any:
    return typer.main.get_command(app).commands[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples(run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a narrow terminal too: every option has its whole name, and an example can be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    result = run(command, "--help")
    assert result.code == 0
    assert "Examples" in result.out
    text = result.out.partition("Examples")[2].partition("╭")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    starts = [line for before, line in pairwise(["", *lines]) if not before.endswith("\\")]
    assert [line for line in starts if not line.startswith(("hf-spqr ", "torchrun "))] == []
    assert any(f"hf-spqr {command}" in line for line in lines)
    options = [name for one in subcommand(command).params for name in (*one.opts, *one.secondary_opts)]
    assert "--json" in options and [name for name in options if name[0] == "-" and f"{name} " not in result.out] == []


def test_without_arguments_it_shows_the_commands(run) -> None:
    result = run()
    assert "quantize" in result.out + result.err


def test_a_bug_shows_its_traceback(monkeypatch) -> None:
    from hf_spqr.cli import doctor

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "kernels", broken)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


@pytest.mark.parametrize("name", ["[old]", "[/red]", "a:b:c"])
def test_messages_show_names_as_they_are(run, name: str) -> None:
    result = run("inspect", f"/nonexistent/{name}/model")
    assert result.code == 1 and f"/nonexistent/{name}/model does not exist" in result.err


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "hf_spqr.cli", "inspect", "/nonexistent/model"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error:")
    assert "Traceback" not in done.stderr
