"""GPTQModel's GPTQ and AWQ."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from . import Job, Quantized, TooNarrow, affine_bits, linears

PACKAGE = "gptqmodel"


def quantize(job: Job, method: str, bits: int, group: int, **settings: object) -> Quantized:
    """``method``: gptq or awq. settings: further fields of its QuantizeConfig."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer than three cores it does not start otherwise
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD

    layers = linears(job.model())
    if any(m.in_features % group or m.in_features % 32 for m in layers.values()):
        raise TooNarrow(f"columns must be a multiple of 32 and of the group, {group}")
    if method == "awq" and any(m.out_features % 64 for m in layers.values()):
        raise TooNarrow("rows must be a multiple of 64")
    if method == "awq":
        settings |= {"quant_method": METHOD.AWQ, "format": FORMAT.GEMM}
    else:
        settings |= {"format": FORMAT.GPTQ_V2}  # zero points as they are: version 1 stores them less 1
    config = QuantizeConfig(bits=bits, group_size=group, offload_to_disk=False, **settings)
    model = GPTQModel.load(job.folder, config, device="cpu")
    model.quantize(job.examples(), batch_size=8)
    inner = model.model
    tensors = {f"{name}.weight": dequantized(inner.get_submodule(name)) for name in layers}
    if method == "awq":  # its scales went into the norms, and into the rows of layers that are quantized themselves
        norms = {name: value.detach().float() for name, value in inner.state_dict().items() if "norm" in name}
        tensors |= norms
    return Quantized(tensors, affine_bits(layers, bits, group, 16 + bits))


def dequantized(layer: Any) -> Tensor:
    weight: Tensor = layer.dequantize_weight().detach().float()
    return weight.T.contiguous() if weight.shape[0] == layer.in_features else torch.as_tensor(weight)
