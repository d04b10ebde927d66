"""AutoRound (SignRound, arXiv 2309.05516) with its own defaults: 200 steps of 8 sequences, or 1000 for ``best``."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from . import Job, Quantized, TooNarrow, affine_bits, linears

PACKAGE = "auto-round"


def quantize(job: Job, bits: int, group: int, **settings: object) -> Quantized:
    """settings: further arguments of AutoRound. Scales take 16 bits and the packed zero point ``bits`` per group."""
    from auto_round import AutoRound

    names = linears(job.model())
    rounder = AutoRound(
        job.model(), job.tokenizer, bits=bits, group_size=group, dataset=DataLoader(job.windows, batch_size=None),
        seqlen=job.windows[0].shape[1], nsamples=len(job.windows), seed=42 + job.seed, device_map="cpu",
        enable_torch_compile=False, **settings,
    )  # fmt: skip
    model, _ = rounder.quantize()
    tensors = {}
    for name in names:
        layer = model.get_submodule(name)
        if not hasattr(layer, "scale"):
            raise TooNarrow(f"AutoRound left {name} alone, with {layer.in_features} columns")
        columns = layer.in_features
        scale = layer.scale.float().repeat_interleave(group, 1)[:, :columns]
        weight = layer.weight.detach().float()  # it was computed in bfloat16: the codes are still plain to see
        codes = torch.where(scale == 0, 0, (weight / scale).round())
        assert float((codes * scale - weight).abs().amax()) <= 2**-7 * float(weight.abs().amax())
        tensors[f"{name}.weight"] = codes * scale
    return Quantized(tensors, affine_bits(names, bits, group, 16 + bits))
