"""The linear module of affine formats: OmniQuant, GPTQ, round-to-nearest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_spqr import ops
from hf_spqr.formats import affine
from hf_spqr.formats.affine import AffineLayout, AffineWeight
from hf_spqr.nn.packed import PackedLinear, wrong_columns
from hf_spqr.ops import reference


def describe_activations(act_bits: int | None, act_sym: bool) -> str:
    """What a layer's ``repr`` says of its activations, beginning with a comma."""
    return "" if act_bits is None else f", act_bits={act_bits}" + (", act_sym=True" if act_sym else "")


class AffineLinear(PackedLinear):
    """A linear layer whose matrix is in the format of :mod:`hf_spqr.formats.affine`.

    ``act_bits``: bits to which each token of the input is quantized first (dynamic; symmetric with ``act_sym``). The
    product is then one of integers (:func:`hf_spqr.ops.integer_linear`). None leaves the input alone.
    """

    tensor_names = affine.TENSORS
    linear, reference_linear = ops.affine_linear, reference.affine_linear
    dequantize, reference_dequantize = ops.affine_dequantize, reference.affine_dequantize
    layout: AffineLayout
    act_bits: int | None = None
    act_sym: bool = False

    @classmethod
    def from_weight(cls, weight: AffineWeight, bias: Tensor | None, dtype: torch.dtype) -> AffineLinear:
        """Pack ``weight``; ``dtype`` is that of the layer it replaces."""
        return cls(weight.layout, affine.pack(weight), bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.act_bits is None:
            return super().forward(x)
        if x.size(-1) != self.layout.in_features:
            raise wrong_columns(x, self.layout.in_features)
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return ops.integer_linear(
            x, self.packed, self.perm, bias, self.layout.out_features, self._numbers,
            self.act_bits, self.act_sym, self.backend == "reference",
        )  # fmt: skip

    @staticmethod
    def _check_trusted(layout: AffineLayout, tensors: Mapping[str, Tensor]) -> None:
        PackedLinear._check_trusted(layout, tensors)
        affine.check_statistics(layout, tensors["packed"])

    def extra_repr(self) -> str:
        return super().extra_repr() + describe_activations(self.act_bits, self.act_sym)

    @staticmethod
    def layout_numbers(layout: AffineLayout) -> tuple[int | bool, ...]:
        return layout.bits, layout.group_size, layout.symmetric, layout.scale_dtype == torch.bfloat16
