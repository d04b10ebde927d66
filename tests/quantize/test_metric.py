"""The metric of every block comes from a pass back through the model, and makes the quantized model diverge less."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_spqr.calibration.data import calibration_windows
from hf_spqr.calibration.fisher import FisherSum
from hf_spqr.config import OmniQuantConfig
from hf_spqr.quantize import blockwise, metric, quantize_model
from tests.tiny_models import tiny_model

IDS = list(torch.arange(12 * 32).reshape(12, 32) * 7 % 250)


class Turned(nn.Module):
    """A decoder whose blocks have the tokens first, [T, 1, H], and where tokens meet."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

        def forward(self, hidden_states):
            assert hidden_states.shape == (32, 1, 64)
            return (hidden_states + self.down(self.up(hidden_states.cumsum(0) / 8).tanh()), "more")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(258, 64), nn.Linear(64, 258)
        self.layers = nn.ModuleList([self.Block(), self.Block(), self.Block()])

    def forward(self, input_ids, use_cache=False):
        hidden = self.embed(input_ids.T)
        for layer in self.layers:
            hidden, _ = layer(hidden)
        return SimpleNamespace(logits=self.head(hidden.movedim(1, 0)))


def run(model, monkeypatch, **fields):
    """The metrics with which the blocks of ``model`` were learned, and the report."""
    learn, seen = blockwise.quantize_block, []

    def spy(*args, metric, **kwargs):
        seen.append(metric)
        return learn(*args, metric=metric, **kwargs)

    monkeypatch.setattr(blockwise, "quantize_block", spy)
    fields = {"bits": 4, "group_size": 32, "epochs": 1, "nsamples": 12, "seqlen": 32, "dataset": IDS} | fields
    return seen, quantize_model(model, OmniQuantConfig(**fields), progress=False)


def whole_model(model, samples=12):
    """The same from gradients of the model as a whole, for the first ``samples`` sequences."""
    blocks = model.get_submodule(LISTS[type(model).__name__])
    sums = [FisherSum(64) for _ in blocks]
    outputs = []
    for block in blocks:
        block.register_forward_hook(lambda m, a, o: outputs.append(o[0] if isinstance(o, tuple) else o))
    for sample, ids in enumerate(calibration_windows(IDS, None, nsamples=12, seqlen=32, seed=0)[:samples]):
        outputs.clear()
        logarithms = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
        drawn = torch.multinomial(logarithms.detach().exp(), 1, generator=torch.Generator().manual_seed(sample))
        gradients = torch.autograd.grad(logarithms.gather(-1, drawn).sum(), outputs)
        for total, gradient in zip(sums, gradients, strict=True):
            total.add(gradient)
    return [total.information() for total in sums]


LISTS = {"Gemma2ForCausalLM": "model.layers", "MixtralForCausalLM": "model.layers", "Turned": "layers"}


@pytest.mark.parametrize("make", [partial(tiny_model, "gemma2"), partial(tiny_model, "mixtral"), Turned])
def test_metrics_are_those_of_the_whole_models_gradients(make, monkeypatch):
    expected = whole_model(make())
    found, report = run(make(), monkeypatch)
    assert len(found) == len(expected) and not any("fisher" in note for note in report.notes)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
        assert float((wanted - torch.eye(64)).norm()) > 0.3  # it says something


def test_no_more_tokens_are_used_than_are_enough(monkeypatch):
    monkeypatch.setattr(metric, "TOKENS", 100)
    expected = whole_model(Turned(), 4)
    found, _ = run(Turned(), monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "fields",
    [{"learning": {"fisher": False}}, {"rounding": False, "lwc": False, "let": False, "epochs": 0}],
    ids=["plain", "nothing to learn"],
)
def test_no_pass_back_where_it_is_not_wanted(fields, monkeypatch):
    monkeypatch.setattr(blockwise, "output_metrics", None)
    found, _ = run(tiny_model("llama"), monkeypatch, **fields)
    assert found == [None, None]


class NoLogits(Turned):
    def forward(self, input_ids, use_cache=False):
        return super().forward(input_ids).logits


class NoGradient(Turned):
    def forward(self, input_ids, use_cache=False):
        with torch.no_grad():
            return super().forward(input_ids)


class NoGradientInside(Turned):
    class Block(Turned.Block):
        def forward(self, hidden_states):
            return super().forward(hidden_states.detach() if self is self.first else hidden_states)

    def __init__(self):
        super().__init__()
        for layer in self.layers:
            object.__setattr__(layer, "first", self.layers[1])


@pytest.mark.parametrize("make", [NoLogits, NoGradient, NoGradientInside])
def test_without_a_gradient_plain_errors_are_learned_and_the_report_says_so(make, monkeypatch):
    found, report = run(make(), monkeypatch)
    assert found == [None, None, None] and len(report.layers) == 6
    assert report.notes[0].startswith("Blocks are learned by plain squared errors, without fisher: ")


def test_running_out_of_memory_is_no_missing_gradient(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(metric, "gradient_at_the_end", fail)
    with pytest.raises(torch.OutOfMemoryError):
        run(tiny_model("llama"), monkeypatch)


def test_the_quantized_model_diverges_less(monkeypatch):
    """Where the head reads few of the channels, errors in the others of the last block do not matter."""
    divergences = []
    for fisher in (False, True):
        model = Turned()
        model.head.weight.data[:, 4:] = 0
        test = torch.randint(0, 250, (16, 32), generator=torch.Generator().manual_seed(1))
        fields = {"bits": 2, "epochs": 20, "rounding_lr": 0.03, "learning": {"fisher": fisher}}
        with torch.no_grad():
            expected = torch.cat([model(ids[None]).logits for ids in test]).log_softmax(-1)
            run(model, monkeypatch, **fields)
            found = torch.cat([model(ids[None]).logits for ids in test]).log_softmax(-1)
        divergences.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    plain, weighted = divergences
    assert weighted < 0.8 * plain, divergences
