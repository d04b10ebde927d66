"""What shows before a model is quantized: weights that others read, and blocks that are no chain."""

import pytest
import torch
from torch import nn

from hf_spqr import CalibrationError, OmniQuantConfig, SpQRConfig, UnsupportedLayerError
from hf_spqr.calibration.blocks import Call
from hf_spqr.quantize import quantize_model
from hf_spqr.quantize.trial import Trial, read_by_others, try_out
from tests.architectures.matrix import IDS, METHODS, distance, logits
from tests.architectures.rows import ARCHITECTURES


def build(kind):
    return next(one for one in ARCHITECTURES if one.kind == kind).build()


class Reader(nn.Module):
    """Calls one layer, reads the weights of two, one of which it calls too, asks one for dtype and device only, and
    gives one its input by name."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.both, self.asked = (nn.Linear(64, 64) for _ in range(4))
        self.named = nn.Linear(64, 64)

    def forward(self, hidden_states):
        x = self.called(hidden_states) @ self.read.weight.mT + self.read.bias
        x = self.both(x) + self.both.weight.sum()
        x = self.asked(x.to(self.asked.weight.device, self.asked.weight.dtype))
        return (self.named(input=x), None)


def test_layers_whose_weight_is_read():
    """A sum over an empty weight would be no error, only wrong; and packed layers know their input as x."""
    block = Reader()
    layers = dict(block.named_children())
    assert read_by_others(block, layers, torch.randn(1, 8, 64), Call((), {})) == {"read", "both", "named"}
    assert dict(block.named_children()) == layers
    assert read_by_others(block, {"called": block.called}, torch.randn(1, 8, 64), Call((), {})) == set()


@pytest.mark.parametrize(
    ("kind", "layer", "method"),
    [("mamba", "mixer.dt_proj", "SpQR"), ("mamba", "mixer.dt_proj", "OmniQuant"), ("jamba", "mamba.dt_proj", "SpQR")],
)
def test_they_are_left_alone(kind, layer, method):
    model = build(kind)
    before = logits(model)
    report = quantize_model(model, METHODS[method](), progress=False)
    assert 0 < distance(logits(model), before) < 0.3
    assert [name for name in report.skipped if name.endswith(layer)]
    assert not [entry for entry in report.layers if entry.name.endswith(layer)]
    assert any("layers were left alone, for the model's code reads their weights" in note for note in report.notes)


def test_a_chain_says_nothing():
    assert try_out(build("llama"), SpQRConfig(bits=4), IDS) == Trial() and Trial().notes() == []


@pytest.mark.parametrize("kind", ["albert", "hrm_text"])
def test_blocks_in_a_loop_are_calibrated_at_once(kind):
    model = build(kind)
    before = logits(model)
    report = quantize_model(model, METHODS["SpQR"](), progress=False)
    assert report.notes[0].startswith("All blocks were calibrated at once") and "more than once" in report.notes[0]
    assert not any("no calibration token" in note for note in report.notes)
    assert 0 < distance(logits(model), before) < 0.1


def test_omniquant_refuses_them_before_any_work():
    model = build("hrm_text")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedLayerError, match=r"L_module.layers.0 is called more than once.*SpQRConfig"):
        quantize_model(model, METHODS["OmniQuant"](), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Deaf(nn.Module):
    """Reads token ids, and fails for want of something else."""

    main_input_name = "input_ids"

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64)])

    def forward(self, input_ids, use_cache=False, images=None):
        return self.layers[0](images[0])


def test_a_model_that_needs_more_than_token_ids_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"Deaf cannot be run on token ids alone .TypeError"):
        try_out(Deaf(), SpQRConfig(bits=4), IDS)
    with pytest.raises(UnsupportedLayerError, match="Deaf does not allow: TypeError"):
        try_out(Deaf(), OmniQuantConfig(bits=4), IDS)
    assert not issubclass(UnsupportedLayerError, CalibrationError)
