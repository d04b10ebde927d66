"""OmniQuant's published ``.pth`` files: learned parameters applied to the base model, without training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_spqr.calibration.blocks import Block, find_blocks
from hf_spqr.config import OmniQuantConfig
from hf_spqr.errors import CheckpointError
from hf_spqr.integrations.stored import layer_report
from hf_spqr.integrations.transformers import attach
from hf_spqr.methods.omniquant.published import clipped_weight, clipping_of, fold_transforms
from hf_spqr.nn import AffineLinear
from hf_spqr.quantize.targets import find_targets, left_alone
from hf_spqr.report import QuantizationReport

__all__ = ["apply_parameters", "read_parameters"]

Parameters = dict[int, Mapping[str, Tensor]]


def read_parameters(path: str | os.PathLike[str]) -> Parameters:
    """The parameters of every block, by its number. Only tensors are unpickled, never code.

    Raises CheckpointError when the file is not one of OmniQuant's.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} does not exist.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file of another kind makes the unpickler stumble over
        raise CheckpointError(f"{path} is no file of OmniQuant parameters, or it is damaged.") from error
    if not isinstance(found, dict) or not found or not all(isinstance(value, Mapping) for value in found.values()):
        raise CheckpointError(f"{path} is no file of OmniQuant parameters: a dict of blocks was expected.")
    if not any("bound_factor" in name or "smooth" in name for block in found.values() for name in block):
        raise CheckpointError(f"{path} has neither clipping factors nor transforms: it is not OmniQuant's.")
    return {int(index): block for index, block in found.items()}


@torch.no_grad()
def apply_parameters(
    model: nn.Module, parameters: Parameters, *, bits: int, group_size: int = -1, act_bits: int | None = None
) -> QuantizationReport:
    """Fold the transforms of the file into ``model``, in place, and quantize its linear layers as published.

    The file does not say bits, group_size (-1: per channel) and act_bits (None: activations are left alone) of its
    training; its name does, e.g. ``w3a16g128`` or ``w4a4``.

    Raises:
        CheckpointError: the parameters do not fit the model.
    """
    config = OmniQuantConfig(bits=bits, group_size=group_size, act_bits=act_bits, rounding=False, epochs=0)
    blocks = find_blocks(model)
    if set(parameters) != set(range(len(blocks))):
        raise CheckpointError(
            f"The file has parameters of {len(parameters)} blocks, the model has {len(blocks)}: it was trained on"
            " another model, or its training was not finished."
        )
    targets = find_targets(model, blocks, config)
    report = QuantizationReport(
        method="omniquant",
        config=config.to_dict(),
        skipped=left_alone(model, [target.name for target in targets]),
        notes=["Learned parameters of an OmniQuant .pth file were applied to the base model; nothing was trained."],
    )
    widened = 0
    for index, block in enumerate(blocks):
        _fold(block, parameters[index])
        for target in (t for t in targets if t.block == index):
            linear: Any = target.linear
            clipping = clipping_of(parameters[index], target.local_name)
            try:
                weight, outside = clipped_weight(linear.weight.detach(), bits, group_size, clipping)
            except CheckpointError as error:
                raise CheckpointError(f"{target.name}: {error}") from error
            widened += outside
            bias = None if linear.bias is None else linear.bias.detach()
            module = AffineLinear.from_weight(weight, bias, linear.weight.dtype)
            block.module.set_submodule(target.local_name, module)
            report.layers.append(layer_report(target.name, module, "omniquant"))
    if widened:
        report.notes.append(
            f"{widened} groups have no 0 in their range; the original codes them with a zero point outside the codes,"
            " here their range was widened to hold 0."
        )
    attach(model, config)
    model.quantization_report = report  # type: ignore[assignment]
    return report


def _fold(block: Block, stored: Mapping[str, Tensor]) -> None:
    tensors = dict(block.module.named_parameters())
    try:
        changed = fold_transforms(tensors, stored)
    except CheckpointError as error:
        raise CheckpointError(f"{block.name}: {error}") from error
    for name, value in changed.items():
        tensors[name].copy_(value)
