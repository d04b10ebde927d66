"""The table of peers: the divergence is one, sizes are those of the formats, and an absent library is named."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, machine
from benchmarks.accuracy_peers import Job, affine_bits, linears, ours
from hf_spqr.calibration.data import calibration_windows
from hf_spqr.config import SpQRConfig
from tests.tiny_models import byte_tokenizer, tiny_model


@pytest.fixture
def job(texts: list[str], tmp_path: Path) -> Job:
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    windows = calibration_windows(texts, byte_tokenizer(), nsamples=4, seqlen=32)
    return Job(str(tmp_path / "tiny"), byte_tokenizer(), windows, seed=0)


def test_divergence_is_the_mean_over_tokens(texts: list[str]) -> None:
    model = tiny_model("llama").eval()
    other = copy.deepcopy(model)
    other.lm_head.weight.data.mul_(1.5)
    assert accuracy.divergence(model, model, byte_tokenizer(), texts[:2]) == 0
    total, tokens = 0.0, 0
    for text in texts[:2]:
        ids = torch.tensor(byte_tokenizer()(text)["input_ids"])[None, : model.config.max_position_embeddings]
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1].double().softmax(-1) for m in (model, other))
        total, tokens = total + float((p * (p / q).log()).sum()), tokens + len(p)
    assert accuracy.divergence(model, other, byte_tokenizer(), texts[:2]) == pytest.approx(total / tokens, rel=1e-3)


def test_our_sizes_without_padding_are_those_of_wide_layers(job: Job) -> None:
    affine = ours.quantize(job, "rtn", bits=3, group_size=32)
    assert affine.nominal == 3 + 19 / 32 and affine.bits > affine.nominal
    plain = ours.quantize(job, "spqr", nominal=3.6)
    assert plain.nominal == pytest.approx(3.625) and plain.bits > plain.nominal + 0.5
    more = ours.quantize(job, "spqr", nominal=4.2, bits=3)
    assert more.nominal == pytest.approx(4.2, rel=0.03)
    assert ours.quantize(job, "spqr", nominal=4.15).nominal == pytest.approx(4 + 10 / 64)  # without outliers
    wide = SpQRConfig(bits=3).layout(4096, 4096)
    assert 8 * wide.fixed_bytes / 4096**2 == pytest.approx(3.625 + 32 / 4096, rel=1e-4)


def test_what_is_scored_is_what_the_layers_compute_with(job: Job) -> None:
    made = ours.quantize(job, "rtn", bits=2, group_size=-1)
    model, original = accuracy.filled(job.folder, made.tensors), job.model()
    assert made.tensors.keys() == {f"{name}.weight" for name in linears(original)}
    for name, layer in linears(model).items():
        assert torch.equal(layer.weight, made.tensors[f"{name}.weight"])
        assert all(len(row.unique()) <= 4 for row in layer.weight)
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_bits_of_codes_and_groups(job: Job) -> None:
    layers = linears(tiny_model("llama"))
    short = {name: m for name, m in layers.items() if m.in_features == 64}
    assert affine_bits(short, 4, 32, 20) == 4 + 20 / 32
    assert affine_bits(short, 4, 48, 20) == 4 + 2 * 20 / 64  # the second group of a row is short


def test_cells_are_kept_and_an_absent_library_is_named(
    job: Job, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    monkeypatch.setitem(sys.modules, "hqq", None)

    def run(*more: str) -> None:
        files = (job.folder, tmp_path / "text.jsonl", tmp_path / "text.jsonl")
        settings = ("--documents", "2", "--nsamples", "4", "--seqlen", "32", "--sizes", "3")
        monkeypatch.setattr(sys, "argv", ["accuracy", *map(str, files), *settings, *more])
        accuracy.main()

    run("--methods", "RTN", "HQQ")
    assert "HQQ at 3 bits, groups of 32 left out" in capsys.readouterr().out
    found = tmp_path / "accuracy_tiny.json"
    first = json.loads(found.read_text())["rows"]
    run("--methods", "RTN", "SpQR", "--seeds", "0", "1")
    result = json.loads(found.read_text())
    assert result["rows"][:1] == first
    assert [(row["method"], row["seed"]) for row in result["rows"]] == [
        ("RTN", 0), ("SpQR", 0), ("SpQR", 1), ("RTN", 1),
    ]  # fmt: skip
    shown = accuracy.table([result], "3", [0, 1]).splitlines()
    assert [line.split(" | ")[0] for line in shown[2:]] == ["| SpQR", "| RTN"]
    mean = sum(row["perplexity"] for row in result["rows"] if row["method"] == "SpQR") / 2
    assert f"{mean:.3f}" in shown[2]
    with pytest.raises(SystemExit):
        run("--documents", "1")
    assert "other settings" in capsys.readouterr().err
