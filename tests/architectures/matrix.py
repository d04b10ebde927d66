"""What is checked on every architecture of the table in docs/status.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_spqr import OmniQuantConfig, SpQRConfig
from hf_spqr.config import PackedConfig
from hf_spqr.integrations.transformers import quantize_model
from tests.architectures.rows import Architecture

IDS = torch.arange(3, 23)[None]


def spqr_config() -> SpQRConfig:
    return SpQRConfig(bits=4, dataset=calibration_ids(), nsamples=2, seqlen=32)


def omniquant_config() -> OmniQuantConfig:
    return OmniQuantConfig(bits=4, group_size=16, epochs=1, dataset=calibration_ids(), nsamples=2, seqlen=32)


METHODS: dict[str, Callable[[], PackedConfig]] = {"SpQR": spqr_config, "OmniQuant": omniquant_config}


def calibration_ids() -> Tensor:
    return torch.randint(1, 250, (2, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def assert_same(a: PreTrainedModel, b: PreTrainedModel) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert torch.equal(logits(a), logits(b))


def assert_same_classes(dequantized: PreTrainedModel, original: PreTrainedModel) -> None:
    """The modules of a model that was never quantized; ``nn.Linear`` stands for its subclasses (Falcon has one)."""
    modules = dict(original.named_modules())
    assert modules.keys() == dict(dequantized.named_modules()).keys()
    assert all(isinstance(modules[name], type(module)) for name, module in dequantized.named_modules())


@dataclass
class Outcome:
    """What happened: packed layers, linear layers left alone, relative change of the logits."""

    packed: int
    skipped: int
    change: float


def check(architecture: Architecture, method: str, folder: Path) -> Outcome:
    """Quantize, save, reload to the bit, generate (but for encoders), dequantize, save and reload without the
    package's modules.

    Raises AssertionError, or whatever fails.
    """
    model = architecture.build()
    load = type(model).from_pretrained
    before = logits(model)
    report = quantize_model(model, METHODS[method](), progress=False)
    quantized = logits(model)
    change = distance(quantized, before)
    assert report.layers and 0 < change < 0.6
    model.save_pretrained(folder / "quantized")
    loaded = load(folder / "quantized")
    assert_same(loaded, model)
    if model.can_generate():
        tokens = loaded.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
        assert tokens.shape[1] == (4 if model.config.is_encoder_decoder else IDS.shape[1] + 3)
    loaded.dequantize()
    assert_same_classes(loaded, architecture.build())
    assert distance(logits(loaded), quantized) < 1e-3
    loaded.save_pretrained(folder / "dequantized")
    assert_same(load(folder / "dequantized"), loaded)
    return Outcome(len(report.layers), len(report.skipped), change)
