"""torchao's integer weights: rounded to nearest, or with the scales of HQQ; without data."""

from __future__ import annotations

import torch

from . import Job, Quantized, TooNarrow, affine_bits, linears

PACKAGE = "torchao"


def quantize(job: Job, bits: int, group: int, hqq: bool) -> Quantized:
    """Scales are 16 bits wide; rounding to nearest has a zero point of ``bits``, HQQ's scales are symmetric."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
    from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import (
        IntxChooseQParamsAlgorithm as Algorithm,
    )

    model = job.model()
    layers = linears(model)
    if any(m.in_features % group for m in layers.values()):
        raise TooNarrow(f"columns must be a multiple of the group, {group}")
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group),
        mapping_type=MappingType.SYMMETRIC if hqq else MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=Algorithm.HQQ_SCALE_ONLY if hqq else Algorithm.AFFINE,
    )
    quantize_(model, config, filter_fn=lambda module, name: name in layers)
    tensors = {f"{name}.weight": layer.weight.dequantize().float() for name, layer in layers.items()}
    return Quantized(tensors, affine_bits(layers, bits, group, 16 if hqq else 16 + bits))
