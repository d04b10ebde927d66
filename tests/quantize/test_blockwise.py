"""OmniQuant over whole models: every architecture, both streams, reports."""

import copy
import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from tqdm import tqdm

from hf_spqr import ConfigError
from hf_spqr.config import OmniQuantConfig
from hf_spqr.methods.omniquant import OmniQuantParams, preset
from hf_spqr.nn import AffineLinear
from hf_spqr.quantize import quantize_model
from tests.tiny_models import ARCHITECTURES, tiny_model

IDS = torch.arange(40)[None]


def run(model, texts, tokenizer, **fields):
    fields = {"bits": 4, "group_size": 32, "epochs": 1, "nsamples": 8, "seqlen": 32, "dataset": texts, **fields}
    return quantize_model(model, OmniQuantConfig(**fields), tokenizer=tokenizer, progress=False)


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("transforms", [False, True], ids=["grid", "transforms"])
def test_every_architecture(kind, transforms, texts, tokenizer):
    model = tiny_model(kind)
    before = logits(model)
    report = run(model, texts, tokenizer, let=transforms)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, AffineLinear)}
    assert len(packed) == len(report.layers) and {layer.method for layer in report.layers} == {"omniquant"}
    assert report.nbytes == sum(m.nbytes() for m in packed.values())
    assert len(report.notes) == 2 and all("after training" in note for note in report.notes)
    assert ("transforms" in report.notes[0]) == transforms
    for index, block in enumerate(report.blocks):
        assert block.name.endswith(f".{index}") and block.final <= block.initial and block.steps == 2
        assert block.skipped == 0 and bool(block.transforms) == transforms
    assert 0 < float((logits(model) - before).norm() / before.norm()) < 0.3


def test_packed_layers_compute_what_their_matrices_say(texts, tokenizer):
    model = tiny_model("llama")
    run(model, texts, tokenizer, let=True)
    dense = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, AffineLinear):
            dense.set_submodule(name, module.to_linear())
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-3)


def test_sequences_of_other_lengths_are_left_out(tokenizer):
    ids = [torch.randint(0, 256, (n,)) for n in (32, 32, 20, 32)]
    report = run(tiny_model("llama"), ids, tokenizer)
    assert report.notes[0].startswith("1 calibration sequences shorter than the others")


class Streams(nn.Module):
    """A decoder whose hidden states are [streams, sequences, tokens, features], as those of Gemma 3n."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

        def forward(self, hidden_states):
            assert hidden_states.shape[0] == 4 and hidden_states.shape[2:] == (32, 64)
            return hidden_states + self.down(self.up(hidden_states).tanh())

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(258, 64)
        self.layers = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, input_ids, use_cache=False):
        hidden = self.embed(input_ids) * torch.arange(1, 5).view(4, 1, 1, 1)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.mean(0)


def test_sequences_need_not_come_first_in_hidden_states(texts, tokenizer):
    torch.manual_seed(0)
    model = Streams()
    ids = torch.arange(32)[None]
    with torch.no_grad():
        before = model(ids)
        report = run(model, texts, tokenizer, let=False)
        assert len(report.layers) == 4 and all(block.final <= block.nearest for block in report.blocks)
        assert 0 < float((model(ids) - before).norm() / before.norm()) < 0.1
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.layers)


def test_progress_shows_step_loss_best_and_time_left(texts, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("hf_spqr.quantize.driver.tqdm", partial(tqdm, mininterval=0, ascii=True, ncols=200))
    config = OmniQuantConfig(bits=4, group_size=32, epochs=4, nsamples=8, seqlen=32, dataset=texts)
    quantize_model(tiny_model("llama"), config, tokenizer=tokenizer)
    line = r"(\d+)/14 \[\S+<(\S+),[^\r]*layers\.(\d) step (\d+)/(\d+) loss (\S+) best ([^\s\]]+)"
    shown = re.findall(line, capsys.readouterr().err)
    assert [(block, step) for _, _, block, step, _, _, _ in shown] == [(b, str(s)) for b in "01" for s in range(1, 9)]
    assert [int(line[0]) for line in shown] == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14]
    assert all(line[1] != "?" for line in shown[1:])
    for block in "01":
        best = [float(line[6]) for line in shown if line[2] == block]
        assert best == sorted(best, reverse=True) and best[-1] < best[0]


def test_exclusions(texts, tokenizer):
    model = tiny_model("llama")
    run(model, texts, tokenizer, modules_to_not_convert=["layers.0", "mlp"])
    packed = {n for n, m in model.named_modules() if isinstance(m, AffineLinear)}
    assert packed == {f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"}


MIXED = {
    "down_proj": {"bits": 8, "group_size": -1}, r"layers\.0\.mlp\.down_proj": {"bits": 6}, "q_proj": {"sym": True},
}  # fmt: skip


def test_overrides_reach_the_layers_and_later_ones_win(texts, tokenizer):
    model = tiny_model("llama")
    report = run(model, texts, tokenizer, overrides=MIXED)
    kinds = {
        name: (m.layout.bits, m.layout.group_size, m.layout.symmetric)
        for name, m in model.named_modules()
        if isinstance(m, AffineLinear)
    }
    special = {
        "model.layers.0.mlp.down_proj": (6, -1, False), "model.layers.1.mlp.down_proj": (8, -1, False),
        "model.layers.0.self_attn.q_proj": (4, 32, True), "model.layers.1.self_attn.q_proj": (4, 32, True),
    }  # fmt: skip
    assert kinds == {name: special.get(name, (4, 32, False)) for name in kinds} and special.keys() <= kinds.keys()
    assert {layer.name: (layer.bits, layer.group_size) for layer in report.layers} == {
        name: kind[:2] for name, kind in kinds.items()
    }


@pytest.mark.parametrize("reference", [False, True])
def test_more_bits_for_all_layers_are_more_bits(reference, texts, tokenizer):
    """Overrides of everything are the same as another config, and learned like it."""
    fields = {"dataset": texts, "epochs": 1, "nsamples": 4, "seqlen": 32}
    outputs = []
    for preset_name, more in (("W2A8", {"overrides": {".*": {"bits": 6}}}), ("W6A8", {})):
        model = tiny_model("llama")
        config = OmniQuantConfig.from_preset(preset_name, reference=reference, **fields, **more)
        config.learning["aug_loss"] = False  # the published preset adds it at 2 bits
        quantize_model(model, config, tokenizer=tokenizer, progress=False)
        outputs.append(logits(model))
    assert torch.equal(*outputs)


def test_fields_beside_a_preset_leave_its_training_as_it_is():
    config = OmniQuantConfig.from_preset("W3A16", reference=True, learning={"holdout": 0.5})
    assert config.params() == replace(preset("W3A16", reference=True), holdout=0.5)


def test_config_round_trip():
    config = OmniQuantConfig.from_preset("W3A16g128", reference=True, dataset=["a"], learning={"holdout": 0.5})
    assert OmniQuantConfig.from_dict(config.to_dict()) == config
    mixed = OmniQuantConfig.from_dict(json.loads(OmniQuantConfig(overrides=MIXED).to_json_string()))
    assert mixed == OmniQuantConfig(overrides=MIXED) and mixed.layout(16, 64, "layers.0.mlp.down_proj").bits == 6
    assert config.params().holdout == 0.5 and config.group_size == 128
    reference = OmniQuantConfig.from_preset("W4A4", reference=True)
    assert reference.params() == preset("W4A4", reference=True)
    assert OmniQuantConfig().params() == OmniQuantParams(group_size=128)
    assert OmniQuantConfig.from_dict(reference.to_dict()).params() == reference.params()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits=1"),
        ({"group_size": 20}, "group_size"),
        ({"act_bits": 9}, "act_bits"),
        ({"act_bits": 8, "group_size": -1, "act_sym": 1}, "True or False"),
        ({"act_sym": True}, "set act_bits"),
        ({"sym": 1}, "True or False"),
        ({"epochs": -1}, "epochs"),
        ({"lwc_lr": "high"}, "use a number"),
        ({"scale_dtype": "float32"}, "'float16', 'bfloat16'"),
        ({"learning": {"speed": 1}}, "'speed' is not one of"),
        ({"overrides": {"mlp": {"act_bits": 4}}}, "'act_bits' cannot differ per layer; use bits, group_size, sym"),
        ({"overrides": {"mlp": {"bits": 9}}}, r"overrides\['mlp'\]: bits=9"),
        ({"overrides": {"mlp": {"sym": "yes"}}}, r"overrides\['mlp'\]: sym='yes'"),
        ({"overrides": {"[": {"bits": 4}}}, "not a valid regular expression"),
        ({"act_bits": 8, "group_size": 64}, "group_size=-1"),
        (
            {"act_bits": 8, "group_size": -1, "overrides": {"mlp": {"group_size": 32}}},
            r"overrides\['mlp'\]: group_size=32",
        ),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        OmniQuantConfig(**fields)
