"""The linear module of affine formats: OmniQuant, GPTQ, round-to-nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr import ops
from hf_spqr.formats import affine
from hf_spqr.formats.affine import AffineLayout, AffineWeight
from hf_spqr.nn.packed import PackedLinear
from hf_spqr.ops import reference


class AffineLinear(PackedLinear):
    """A linear layer whose matrix is in the format of :mod:`hf_spqr.formats.affine`."""

    tensor_names = affine.TENSORS
    linear, reference_linear = ops.affine_linear, reference.affine_linear
    dequantize, reference_dequantize = ops.affine_dequantize, reference.affine_dequantize
    layout: AffineLayout

    @classmethod
    def from_weight(cls, weight: AffineWeight, bias: Tensor | None, dtype: torch.dtype) -> AffineLinear:
        """Pack ``weight``; ``dtype`` is that of the layer it replaces."""
        return cls(weight.layout, affine.pack(weight), bias, dtype)

    @staticmethod
    def layout_numbers(layout: AffineLayout) -> tuple[int | bool, ...]:
        return layout.bits, layout.group_size, layout.symmetric, layout.scale_dtype == torch.bfloat16
