"""A quantized tiny Llama, in memory and on disk, that the tests of this folder share."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_spqr import SpQRConfig
from hf_spqr.nn import SpQRLinear
from tests.tiny_models import byte_tokenizer, tiny_model

IDS = torch.arange(3, 23)[None]


def quantize_folder(
    folder: Path, texts: list[str], dtype: torch.dtype = torch.float32, **fields: object
) -> PreTrainedModel:
    config = SpQRConfig(**{"bits": 3, "dataset": texts, "nsamples": 8, "seqlen": 64, "act_order": True, **fields})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS.to(model.device)).logits


def assert_same(a: PreTrainedModel, b: PreTrainedModel) -> None:
    """The same tensors under the same names, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def packed_layers(model: PreTrainedModel) -> dict[str, SpQRLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SpQRLinear)}


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized(base_folder: Path, texts: list[str]) -> PreTrainedModel:
    return quantize_folder(base_folder, texts)


@pytest.fixture(scope="session")
def folder(quantized: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized")
    quantized.save_pretrained(path)
    return path
