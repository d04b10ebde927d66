"""``hf-spqr push`` against the loopback Hub."""

import json

import pytest
from huggingface_hub import ModelCard

from hf_spqr.cli import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code or 0, *capsys.readouterr()


def test_push(hub, folder, tmp_path, capsys):
    evaluation = tmp_path / "eval.json"
    evaluation.write_text(
        json.dumps({"dataset": "text", "dtype": "float32", "perplexity": 3.0, "protocol_text": "Perplexity"})
    )
    code, out, err = run(
        capsys, "push", folder, "tester/cli", "--private", "--base-model", "a/b", "--license", "mit", "--tag", "t",
        "--evaluation", evaluation, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["oid"] == hub.repos["tester/cli"].branches["main"]
    assert hub.repos["tester/cli"].private
    card = ModelCard.load("tester/cli")
    assert (card.data.base_model, card.data.license) == ("a/b", "mit") and "| this model | 3.0000 |" in card.text


def test_mistakes_are_messages(hub, folder, tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    hub.fail("/commit/", 403, times=50)
    for arguments, message in [
        ((tmp_path / "nothing", "tester/x"), "does not exist"),
        ((folder, "tester/x", "--evaluation", tmp_path / "list.json"), "not a JSON object"),
        ((folder, "tester/x/y"), "cannot be the name of a repository"),
        ((folder, "tester/x"), "nothing was published"),
    ]:
        code, _, err = run(capsys, "push", *arguments)
        assert code == 1 and message in " ".join(err.split()), err
