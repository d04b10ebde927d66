"""bitsandbytes' NF4 in blocks of 64 weights, without data."""

from __future__ import annotations

from . import Job, Quantized, linears

PACKAGE = "bitsandbytes"
BLOCK = 64
SECOND = 256


def quantize(job: Job, double: bool) -> Quantized:
    """``double``: the scales are quantized once more, to 8 bits with a float32 for each 256 of them."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    tensors = {}
    for name, layer in linears(job.model()).items():
        # blocks go on into the next row; given whole rows of 352, 0.50.2's dequantization for CPUs loses them
        weight = layer.weight.detach().reshape(-1, BLOCK)
        state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double, quant_type="nf4")
        tensors[f"{name}.weight"] = dequantize_4bit(*state).float().reshape(layer.weight.shape)
    return Quantized(tensors, 4 + ((8 + 32 / SECOND) if double else 32) / BLOCK)
