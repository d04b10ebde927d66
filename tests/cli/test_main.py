import subprocess
import sys

import pytest

from hf_spqr.cli import main


@pytest.mark.parametrize("command", ["quantize", "eval", "inspect", "doctor"])
def test_help_teaches_with_examples(run, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert "Examples" in result.out
    assert f"hf-spqr {command}" in result.out
    assert "--json" in result.out


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
