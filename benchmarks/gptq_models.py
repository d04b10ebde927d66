"""GPTQ (arXiv 2210.17323) over a whole model in OmniQuant's packed format: a baseline for the tables.

The same calibration sequences, grids and packed layers as OmniQuant; a Hessian per input; blocks one after another,
each on the outputs of the quantized blocks before it. Where the config quantizes activations, so do those blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_spqr import OmniQuantConfig
from hf_spqr.calibration.blocks import find_blocks, record, replay
from hf_spqr.calibration.data import calibration_batches, calibration_windows
from hf_spqr.formats.affine import AffineWeight
from hf_spqr.integrations.activations import enforce
from hf_spqr.integrations.transformers import attach
from hf_spqr.methods import gptq
from hf_spqr.methods.base import AffineParams
from hf_spqr.nn import AffineLinear, dense
from hf_spqr.quantize import Target, find_targets
from hf_spqr.quantize.capture import gather_hessians, hessian_or_identity

__all__ = ["quantize_model"]


@torch.no_grad()
def quantize_model(model: nn.Module, config: OmniQuantConfig) -> float:
    """Quantize ``model`` in place by GPTQ in the format that ``config`` says; returns bits per weight."""
    enforce(model, config)
    blocks = find_blocks(model)
    targets = find_targets(model, blocks, config)
    windows = calibration_windows(
        config.dataset, config.tokenizer, nsamples=config.nsamples, seqlen=config.seqlen, seed=config.seed
    )
    recording = record(model, blocks, calibration_batches(windows))
    hidden, nbytes, weights = recording.hidden, 0, 0
    for index, block in enumerate(blocks):
        mine = {target.local_name: target for target in targets if target.block == index}
        layers = {name: target.linear for name, target in mine.items()}
        sums = gather_hessians(block.module, layers, hidden, recording.calls[index])
        for name, target in mine.items():
            packed = _quantize_layer(target, hessian_or_identity(sums[name]), config)
            block.module.set_submodule(name, packed)
            nbytes, weights = nbytes + packed.nbytes(), weights + packed.out_features * packed.in_features
        hidden = [replay(block.module, h, call) for h, call in zip(hidden, recording.calls[index], strict=True)]
    attach(model, config)
    return 8 * nbytes / weights


def _quantize_layer(target: Target, hessian: torch.Tensor, config: OmniQuantConfig) -> AffineLinear:
    weight = dense.matrix(target.linear)
    params = AffineParams.of(config.layout(*weight.shape, target.name))
    result = gptq.quantize(weight, hessian, params).weight
    assert isinstance(result, AffineWeight)
    bias: Any = target.linear.bias
    packed = AffineLinear.from_weight(result, bias, weight.dtype)
    packed.act_bits, packed.act_sym = config.act_bits, config.act_sym
    return packed
