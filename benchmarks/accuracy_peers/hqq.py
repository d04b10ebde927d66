"""HQQ (half-quadratic quantization), without data, groups along the input."""

from __future__ import annotations

import torch

from . import Job, Quantized, linears

PACKAGE = "hqq"


def quantize(job: Job, bits: int, group: int) -> Quantized:
    """Scales and zero points are both float16; groups go on into the next row where they do not divide one."""
    from hqq.core.quantize import HQQLinear, Quantizer, hqq_base_quant_config

    tensors = {}
    for name, layer in linears(job.model()).items():
        config = hqq_base_quant_config(nbits=bits, group_size=group)
        done = HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu")
        zero, scale = done.meta["zero"].half().float(), done.meta["scale"].half().float()
        wide = {**done.meta, "zero": zero, "scale": scale, "compute_dtype": torch.float32}
        tensors[f"{name}.weight"] = Quantizer.dequantize(done.W_q.data, wide).float()
    return Quantized(tensors, bits + 32 / group)
