"""Pages of a mapped file that were given back are read again; other memory keeps its contents."""

import torch
from safetensors.torch import load_file, save_file

from hf_spqr.quantize.pages import let_go, span


def test_nothing_is_lost(tmp_path):
    weight = torch.arange(300_000, dtype=torch.float32).reshape(500, 600)
    save_file({"small": torch.ones(3), "weight": weight}, tmp_path / "a.safetensors")
    mapped = load_file(tmp_path / "a.safetensors")["weight"]
    copied = weight.clone()
    let_go([span(mapped), span(copied), span(weight[:, 3]), None, (0, 10), (1 << 60, 1 << 20)])
    assert torch.equal(mapped, weight) and torch.equal(copied, weight)


def test_only_contiguous_host_tensors_have_a_span():
    tensor = torch.zeros(4, 8)
    assert span(tensor) == (tensor.data_ptr(), 128)
    assert span(tensor.T) is None
    assert span(torch.empty(4, device="meta")) is None
