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
    layout: AffineLayout

    @classmethod
    def from_weight(cls, weight: AffineWeight, bias: Tensor | None, dtype: torch.dtype) -> AffineLinear:
        """Pack ``weight``; ``dtype`` is that of the layer it replaces."""
        return cls(weight.layout, affine.pack(weight), bias, dtype)

    def _layout_arguments(self) -> tuple[int, int, bool, bool]:
        lay = self.layout
        return lay.bits, lay.group_size, lay.symmetric, lay.scale_dtype == torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        linear = ops.affine_linear if self.backend == "auto" else reference.affine_linear
        return linear(x, self.packed, self.perm, self._bias_for(x), self.out_features, *self._layout_arguments())

    def dequantize_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        dequantize = ops.affine_dequantize if self.backend == "auto" else reference.affine_dequantize
        return dequantize(
            self.packed, self.perm, self.out_features, self.in_features, *self._layout_arguments(),
            dtype or self.weight.dtype,
        )  # fmt: skip
