"""Models that are no causal decoder, through the command line: loaded with the class that their config names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from hf_spqr.integrations.processor import PROCESSOR
from tests.architectures.rows import ARCHITECTURES
from tests.tiny_models import byte_tokenizer

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}

BESIDE = {"llava": PROCESSOR, "bert": ("modules.json", "config_sentence_transformers.json", "1_Pooling/config.json")}
"""Files that the model itself does not write."""


def base_of(kind: str, folder: Path) -> Path:
    if kind == "bert":
        config = transformers.AutoConfig.for_model("bert", vocab_size=258, **SMALL)
        model = transformers.BertModel(config)
    else:
        model = next(one for one in ARCHITECTURES if one.kind == kind).build()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for name in BESIDE.get(kind, ()):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps([{"path": "1_Pooling", "type": "sentence_transformers.Pooling"}]))
    return folder


@pytest.mark.parametrize("kind", ["t5", "llava", "bert"])
def test_nothing_is_lost_and_nothing_random(kind: str, run: Callable, dataset: Path, tmp_path: Path) -> None:
    base, out = base_of(kind, tmp_path / "base"), tmp_path / "out"
    done = run("quantize", base, out, "-d", dataset, "--nsamples", 4, "--seqlen", 32, "--bits", 4, "--group-size", 16)
    assert done.code == 0, done.err
    assert "MISSING" not in done.err and "UNEXPECTED" not in done.err
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    assert after["architectures"] == before["architectures"]
    load = getattr(transformers, before["architectures"][0]).from_pretrained
    unquantized, quantized = load(base), load(out)
    kept = quantized.state_dict()
    packed = {name.removesuffix("packed") for name in kept if name.endswith(".packed")}
    assert packed
    for name, tensor in unquantized.state_dict().items():
        assert name.rpartition(".")[0] + "." in packed or torch.equal(kept[name], tensor), name
    for name in BESIDE.get(kind, ()):
        assert (out / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize(("kind", "cls"), [("t5", "T5ForConditionalGeneration"), ("bert", "BertModel")])
@pytest.mark.parametrize("how", ["dataset", "tasks"])
def test_eval_needs_a_causal_model(
    kind: str, cls: str, how: str, run: Callable, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is seen before one is loaded."""
    for module in ("eval", "tasks"):
        monkeypatch.setattr(f"hf_spqr.cli.{module}.load_model", lambda *arguments: pytest.fail("was loaded"))
    done = run("eval", base_of(kind, tmp_path), *(("-d", dataset) if how == "dataset" else ("--tasks", "arc_easy")))
    assert done.code == 1 and f"is a {cls}, no causal language model" in " ".join(done.err.split())
