"""hf_spqr itself: SpQR, OmniQuant, and rounding to nearest and GPTQ in OmniQuant's format."""

from __future__ import annotations

import math
from typing import Any

import torch

import hf_spqr
from benchmarks import gptq_models
from hf_spqr.quantize.size import Matrices, choose

from . import Job, Quantized, linears

PACKAGE = None


def quantize(job: Job, method: str, nominal: float | None = None, **fields: Any) -> Quantized:
    """``method``: spqr, omniquant, rtn or gptq. ``nominal``: the size that SpQR gets, in bits without padding.

    What ``target_bits`` chooses besides the outliers is what it would in a model of wide layers.
    """
    fields |= {"dataset": [w[0] for w in job.windows], "nsamples": len(job.windows), "seed": job.seed}
    fields |= {"seqlen": job.windows[0].shape[1], "tokenizer": job.tokenizer}
    model = job.model()
    shapes = {name: (m.out_features, m.in_features) for name, m in linears(model).items()}
    weights = sum(map(math.prod, shapes.values()))
    if method == "spqr":
        config: Any = hf_spqr.SpQRConfig(target_bits=nominal, **fields)
        if nominal is not None:
            choose(config, [[Matrices("wide", (4096, 4096), 1, 0)]])
        layout = config.layout(4096, 4096)
        least = 8 * layout.fixed_bytes / 4096**2 - 32 * 4097 / 4096**2
        padding = sum(8 * config.layout(*shape).fixed_bytes for shape in shapes.values()) / weights - least
        if nominal is not None and nominal > least + 1e-6:
            config.target_bits = nominal + padding
        elif nominal is not None:
            config.target_bits, config.outlier_threshold = None, math.inf
    else:
        if method != "omniquant":
            fields |= {"rounding": False, "lwc": False, "let": False, "epochs": 0}
        config = hf_spqr.OmniQuantConfig(**fields)
        padding = None
    if method == "gptq":
        bits = gptq_models.quantize_model(model, config)
    else:
        bits = hf_spqr.quantize_model(model, config, progress=False).bits_per_weight
    packed = {name: model.get_submodule(name) for name in shapes}
    tensors = {f"{name}.weight": module.dequantize_weight(torch.float32) for name, module in packed.items()}
    if padding is None:
        group = config.group_size
        return Quantized(tensors, bits, config.bits + (16 + config.bits) / group)
    return Quantized(tensors, bits, bits - padding)
