"""lm-eval on local tasks: our wrapper, and lm-eval's own command line with the package only installed."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from hf_spqr.cli import main
from hf_spqr.integrations.lm_eval import main_metric
from tests.integrations.conftest import quantize_folder
from tests.tiny_models import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CHOICES = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}/choice.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""
ROLLING = """task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}/text.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choice.yaml").write_text(CHOICES.format(data=folder))
    (folder / "text.yaml").write_text(ROLLING.format(data=folder))
    questions = [{"question": f"{i} and", "choices": [" one", " two", " six"], "label": i % 3} for i in range(12)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:3]))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def folders(model_dir, texts, tmp_path):
    base = model_dir()
    out = tmp_path / "quantized"
    quantize_folder(base, texts).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    return base, out


def command(capfd, *arguments):
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code or 0, *capfd.readouterr()


def test_our_command_and_lm_evals_own_give_the_same_numbers(folders, task_folder, tmp_path, capfd):
    base, out = folders
    code, text, err = command(
        capfd, "eval", out, "--base", base, "--tasks", "local_choice,local_text", "--task-folder", task_folder,
        "--batch-size", 1, "--json",
    )  # fmt: skip
    assert code == 0, err
    ours = json.loads(text)
    assert set(ours["tasks"]) == {"local_choice", "local_text"}
    assert ours["tasks"]["local_choice"]["samples"] == 12
    difference = ours["tasks"]["local_text"]["difference"]["bits_per_byte"]
    before = ours["base"]["tasks"]["local_text"]["metrics"]["bits_per_byte"]
    assert difference == pytest.approx(ours["tasks"]["local_text"]["metrics"]["bits_per_byte"] - before)

    # installed: what pip leaves beside the package is an entry point
    installed = tmp_path / "site" / "hf_spqr-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-spqr\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[torch.backends]\nhf_spqr = hf_spqr_autoload:init\n")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{installed.parent}",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={out}",
         "--device", "cpu", "--tasks", "local_choice", "local_text", "--include_path", task_folder,
         "--output_path", tmp_path / "r.json"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("r*.json")
    theirs = json.loads(written.read_text())["results"]
    for task, metrics in (("local_choice", ("acc", "acc_norm")), ("local_text", ("byte_perplexity", "bits_per_byte"))):
        for metric in metrics:
            assert theirs[task][f"{metric},none"] == pytest.approx(ours["tasks"][task]["metrics"][metric], rel=1e-6)


def test_table_for_people(folders, task_folder, capfd):
    base, out = folders
    code, text, err = command(
        capfd, "eval", out, "--base", base, "--tasks", "local_choice", "--task-folder", task_folder, "--limit", 2
    )
    assert code == 0, err
    head, row = next((a, b) for a, b in pairwise(text.splitlines()) if a.split()[:2] == ["task", "metric"])
    assert head.split()[2:] == ["samples", "base", "model", "stderr", "difference"]
    assert row.split()[:3] == ["local_choice", "acc_norm", "2"] and len(row.split()) == 7


def test_mistakes_are_messages(folders, task_folder, tmp_path, capfd):
    base, _ = folders
    for arguments, code, message in [
        ((), 2, "give either"),
        (("-d", "x.txt", "--tasks", "local_choice"), 2, "give either"),
        (("--tasks", " , "), 1, "give names of lm-eval tasks"),
        (("--tasks", "local_choice", "--task-folder", tmp_path / "none"), 1, "no folder of task files"),
    ]:
        left, _, err = command(capfd, "eval", base, *arguments)
        assert left == code and message in " ".join(err.split()), err


def test_an_unknown_task_is_refused_before_a_model_is_loaded(folders, task_folder, monkeypatch, capfd):
    monkeypatch.setattr("hf_spqr.cli.tasks.load_model", lambda *args: pytest.fail("a model was loaded"))
    left, _, err = command(
        capfd, "eval", folders[0], "--tasks", "local_choice,no_such_task", "--task-folder", task_folder
    )
    assert left == 1 and "knows no task 'no_such_task'" in " ".join(err.split())


def test_patterns_of_tasks(folders, task_folder, capfd):
    _, text, err = command(
        capfd, "eval", folders[0], "--tasks", "local_t*,local_*", "--task-folder", task_folder, "--limit", 1, "--json"
    )
    assert list(json.loads(text)["tasks"]) == ["local_text", "local_choice"], err


def test_the_usual_metric():
    assert main_metric({"acc": 1.0, "acc_norm": 0.5}) == "acc_norm"
    assert main_metric({"f1": 1.0}) == "f1"
    assert main_metric({}) == ""
