"""Ways to quantize the linear layers of a model, ours and other libraries', one file each, for benchmarks/accuracy.py.

A file has ``quantize(job, **settings) -> Quantized``. A peer runs its own code with its own defaults, on the job's
calibration sequences where it calibrates. It raises ImportError where the library is not installed, and
``TooNarrow`` where it cannot quantize layers of this width. ``PACKAGE`` is its name on PyPI, None for ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_spqr.calibration.blocks import find_blocks


class TooNarrow(Exception):
    """The library does not quantize layers of this width."""


class Quantized(NamedTuple):
    """What a method made of a model.

    tensors: the parameters that changed, as the layers compute with them, by name. bits: per weight of the quantized
    layers, as they are stored. nominal: the same without what only narrow layers pay (padding, and 32 bits per row in
    SpQR's format); None where it is no other.
    """

    tensors: dict[str, Tensor]
    bits: float
    nominal: float | None = None


@dataclass(frozen=True)
class Job:
    """A model's folder, its tokenizer, calibration sequences int64 [1, tokens] and a seed for what draws numbers."""

    folder: str
    tokenizer: Any
    windows: list[Tensor]
    seed: int

    def model(self) -> Any:
        """The model in float32, loaded anew."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def examples(self) -> list[dict[str, list[int]]]:
        """The calibration sequences as lists of token ids with their masks."""
        return [{"input_ids": w[0].tolist(), "attention_mask": [1] * w.shape[1]} for w in self.windows]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder's blocks by name: what all methods quantize."""
    return {
        f"{block.name}.{name}": module
        for block in find_blocks(model)
        for name, module in block.module.named_modules()
        if isinstance(module, nn.Linear)
    }


def affine_bits(layers: Mapping[str, nn.Linear], bits: int, group: int, of_group: float) -> float:
    """Bits per weight of codes, and ``of_group`` bits for each group of a row, of which the last may be short."""
    total = sum(m.weight.numel() for m in layers.values())
    groups = sum(m.out_features * math.ceil(m.in_features / group) for m in layers.values())
    return bits + groups * of_group / total
