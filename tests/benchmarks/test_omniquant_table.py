"""The table of methods: GPTQ over a whole model is GPTQ, and cells that are there are not made again."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gptq_models, machine, omniquant_table
from hf_spqr.config import OmniQuantConfig
from hf_spqr.formats import affine
from hf_spqr.methods import gptq
from hf_spqr.methods.base import AffineParams
from hf_spqr.nn import AffineLinear
from tests.tiny_models import byte_tokenizer, tiny_model


def test_gptq_over_a_model(texts: list[str]) -> None:
    """The first layer has the Hessian of what it is given; every layer has the config's layout and activations."""
    model = tiny_model("llama")
    original = copy.deepcopy(model)
    config = OmniQuantConfig(
        bits=3, group_size=-1, act_bits=6, overrides={"down_proj": {"bits": 5}}, dataset=texts,
        tokenizer=byte_tokenizer(), nsamples=8, seqlen=32,
    )  # fmt: skip
    inputs: list[torch.Tensor] = []
    first = "model.layers.0.self_attn.q_proj"
    hook = model.get_submodule(first).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    bits = gptq_models.quantize_model(model, config)
    hook.remove()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AffineLinear)}
    assert len(layers) == 14 and 3 < bits < 8
    assert all(m.layout.bits == (5 if n.endswith("down_proj") else 3) for n, m in layers.items())
    assert all(m.act_bits == 6 for m in layers.values()) and model.config._attn_implementation == "hf_spqr_a6"
    x = torch.cat([i.reshape(-1, 64) for i in inputs[-1:]]).double()  # the pass that gathers the Hessians
    weight = original.get_submodule(first).weight.detach()
    expected = gptq.quantize(weight, (x.T @ x).float(), AffineParams(3, -1)).weight
    layer = layers[first]
    assert torch.equal(affine.unpack(layer.layout, layer.packed_tensors()).codes, expected.codes)


def test_cells_that_are_there_are_not_made_again(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for module in (machine, omniquant_table):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def run(*more: str) -> None:
        files = (tmp_path / "tiny", tmp_path / "text.jsonl", tmp_path / "text.jsonl")
        settings = ("--documents", "2", "--nsamples", "4", "--seqlen", "32", "--schemes", "W3A16")
        monkeypatch.setattr(sys, "argv", ["omniquant_table", *map(str, files), *settings, *more])
        omniquant_table.main()

    run("--methods", "rtn")
    found = tmp_path / "omniquant_table_tiny.json"
    first = json.loads(found.read_text())["rows"]
    run("--methods", "rtn", "gptq")
    rows = json.loads(found.read_text())["rows"]
    assert rows[:1] == first and [row["method"] for row in rows] == ["rtn", "gptq"]
    assert rows[0]["perplexity"] != rows[1]["perplexity"]
    assert rows[0]["bits_per_weight"] == rows[1]["bits_per_weight"]
    values = [row["perplexity"] for row in rows]
    shown = [f"**{value:.3f}**" if value == min(values) else f"{value:.3f}" for value in values]
    table = omniquant_table.table([json.loads(found.read_text())] * 2)
    assert f"| W3A16 | {' / '.join(shown)} / – / – | {' / '.join(shown)} / – / – |" in table
    with pytest.raises(SystemExit):
        run("--documents", "1")
    assert "other settings" in capsys.readouterr().err
