"""Whole models on a GPU through plain ``from_pretrained``: our files, official SpQR files, experts, integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_spqr import OmniQuantConfig, SpQRConfig
from hf_spqr.integrations.export import export_model
from tests.tiny_models import byte_tokenizer, tiny_model

DEVICE = "cuda"
IDS = torch.arange(40)[None] * 5 % 250
KINDS = {
    "spqr": ("llama", SpQRConfig, {"bits": 3, "outlier_threshold": 0.2}),
    "spqr act_order": ("llama", SpQRConfig, {"bits": 4, "act_order": True}),
    "w4": ("llama", OmniQuantConfig, {"bits": 4, "group_size": 128, "epochs": 0}),
    "w8a8": ("llama", OmniQuantConfig, {"bits": 8, "group_size": -1, "act_bits": 8, "epochs": 0}),
    "experts": ("mixtral", SpQRConfig, {"bits": 3}),
}


def quantize(name: str, kind: type, fields: dict[str, Any], texts: list[str], folder: Path) -> PreTrainedModel:
    tiny_model(name).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = kind(dataset=texts, nsamples=4, seqlen=64, **fields)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.float().cpu()


def assert_alike(on_gpu: PreTrainedModel, on_cpu: PreTrainedModel, most: float) -> None:
    """``most``: of the difference, relative to the whole of the logits (fp32 inputs are fp16 inside the kernels)."""
    assert on_gpu.device.type == DEVICE
    expected = logits(on_cpu)
    assert (logits(on_gpu) - expected).norm() <= most * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_on_the_gpu(kind: str, texts: list[str], tmp_path: Path) -> None:
    quantize(*KINDS[kind], texts, tmp_path / "base").save_pretrained(tmp_path / "packed")
    on_cpu = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    on_gpu = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32, device_map=DEVICE)
    assert_alike(on_gpu, on_cpu, 0.05 if kind == "w8a8" else 5e-3)  # a step of 8 bits falls to another side
    generated = on_gpu.generate(IDS.to(DEVICE), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, IDS.shape[1] + 8)


def test_an_official_spqr_file_on_the_gpu(texts: list[str], tmp_path: Path) -> None:
    model = quantize(*KINDS["spqr"], texts, tmp_path / "base")
    official = export_model(model, tmp_path / "official", "spqr")
    on_gpu = AutoModelForCausalLM.from_pretrained(official, dtype=torch.float32, device_map=DEVICE)
    assert_alike(on_gpu, AutoModelForCausalLM.from_pretrained(official, dtype=torch.float32), 5e-3)


@pytest.mark.shared
def test_the_official_fixture_on_the_gpu(shared_dir: Path) -> None:
    folder = shared_dir / "fixtures" / "official_spqr"
    with pytest.warns(UserWarning, match="raw weights"):
        on_gpu = AutoModelForCausalLM.from_pretrained(folder / "tiny_hub", dtype=torch.float32, device_map=DEVICE)
    assert_alike(on_gpu, AutoModelForCausalLM.from_pretrained(folder / "tiny_ref", dtype=torch.float32), 5e-3)


def test_generate_over_a_static_cache_compiles(texts: list[str], tmp_path: Path) -> None:
    quantize(*KINDS["spqr"], texts, tmp_path / "base").save_pretrained(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float16, device_map=DEVICE)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    eager = model.generate(IDS.to(DEVICE), disable_compile=True, **options)
    compiled = model.generate(IDS.to(DEVICE), **options)
    assert model.hf_quantizer.is_compileable and torch.equal(compiled, eager)
