"""The linear module of affine formats: OmniQuant, GPTQ, round-to-nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr import ops
from hf_spqr.formats import affine
from hf_spqr.formats.affine import AffineLayout, AffineWeight
from hf_spqr.nn.packed import PackedLinear
from hf_spqr.ops import reference
from hf_spqr.ops.activation import fake_quantize_activation


class AffineLinear(PackedLinear):
    """A linear layer whose matrix is in the format of :mod:`hf_spqr.formats.affine`.

    ``act_bits``: bits to which each token of the input is quantized first (dynamic, asymmetric); None leaves it alone.
    """

    tensor_names = affine.TENSORS
    linear, reference_linear = ops.affine_linear, reference.affine_linear
    dequantize, reference_dequantize = ops.affine_dequantize, reference.affine_dequantize
    layout: AffineLayout
    act_bits: int | None = None

    @classmethod
    def from_weight(cls, weight: AffineWeight, bias: Tensor | None, dtype: torch.dtype) -> AffineLinear:
        """Pack ``weight``; ``dtype`` is that of the layer it replaces."""
        return cls(weight.layout, affine.pack(weight), bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.act_bits is None:
            return super().forward(x)
        # in float32: 16 bits could not hold scale * code, and the product is that of the integers
        return super().forward(fake_quantize_activation(x.float(), self.act_bits)).to(x.dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", act_bits={self.act_bits}" if self.act_bits is not None else "")

    @staticmethod
    def layout_numbers(layout: AffineLayout) -> tuple[int | bool, ...]:
        return layout.bits, layout.group_size, layout.symmetric, layout.scale_dtype == torch.bfloat16
