"""Uploads that stop halfway: what readers see meanwhile, and that the next push heals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_spqr.integrations.hub import PushError, push_folder
from tests.hub.loopback import LoopbackHub

ROOT = Path(__file__).parents[2]


def change(folder: Path) -> torch.Tensor:
    """Another version of the model; its last norm."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors["model.norm.weight"]


def norm(repo: str) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(repo).model.norm.weight.detach()


@pytest.mark.slow  # another process
@pytest.mark.parametrize(("number", "at"), [(signal.SIGKILL, "upload"), (signal.SIGINT, "/preupload/")])
def test_a_push_that_is_killed(hub: LoopbackHub, folder: Path, number: signal.Signals, at: str) -> None:
    push_folder(folder, "tester/killed")
    before = norm("tester/killed")
    after = change(folder)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "" if hub.xet else "1"}
    environment |= {"HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-m", "hf_spqr.cli", "push", str(folder), "tester/killed"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def end() -> None:
        child.send_signal(number)
        if number == signal.SIGKILL:
            child.wait()

    part = {"upload": "xet-write-token" if hub.xet else "/lfs/"}.get(at, at)
    hub.visit(part, end, drop=number == signal.SIGINT)
    _, said = child.communicate(timeout=120)
    assert child.returncode == (-number if number == signal.SIGKILL else 130), said
    assert torch.equal(norm("tester/killed"), before)
    push_folder(folder, "tester/killed")
    assert torch.equal(norm("tester/killed"), after)


def test_a_first_push_that_broke_leaves_nothing_that_loads(hub: LoopbackHub, folder: Path) -> None:
    hub.visit("/commit/", lambda: hub.fail("/commit/", 500, times=50))
    with pytest.raises(PushError, match="nothing was published"):
        push_folder(folder, "tester/first")
    with pytest.raises((OSError, ValueError), match="tester/first"):
        norm("tester/first")
    hub.faults.clear()
    push_folder(folder, "tester/first")
    norm("tester/first")


def test_an_answer_that_was_lost(hub: LoopbackHub, folder: Path) -> None:
    """The commit is there, and the message does not say that it is not."""
    push_folder(folder, "tester/lost")
    after = change(folder)
    hub.visit("/commit/", drop=True)
    with pytest.raises(PushError, match="may have been published"):
        push_folder(folder, "tester/lost")
    assert torch.equal(norm("tester/lost"), after)
    push_folder(folder, "tester/lost")
    assert torch.equal(norm("tester/lost"), after)


def test_a_reader_while_somebody_pushes(hub: LoopbackHub, folder: Path) -> None:
    push_folder(folder, "tester/read")
    before = norm("tester/read")
    after = change(folder)
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.visit("model.safetensors", lambda: push_folder(folder, "tester/read") and None)
    assert torch.equal(norm("tester/read"), before) or torch.equal(norm("tester/read"), after)
