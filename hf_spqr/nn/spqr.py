"""The linear module of SpQR."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_spqr import ops
from hf_spqr.formats import spqr
from hf_spqr.formats.spqr import SpQRLayout, SpQRWeight
from hf_spqr.nn.packed import PackedLinear
from hf_spqr.ops import reference


class SpQRLinear(PackedLinear):
    """A linear layer whose matrix is in the format of :mod:`hf_spqr.formats.spqr`."""

    tensor_names = spqr.TENSORS
    linear, reference_linear = ops.spqr_linear, reference.spqr_linear
    dequantize, reference_dequantize = ops.spqr_dequantize, reference.spqr_dequantize
    layout: SpQRLayout
    outlier_row: Tensor
    outlier: Tensor

    @classmethod
    def from_weight(cls, weight: SpQRWeight, bias: Tensor | None, dtype: torch.dtype) -> SpQRLinear:
        """Pack ``weight``; ``dtype`` is that of the layer it replaces."""
        return cls(weight.layout, spqr.pack(weight), bias, dtype)

    @staticmethod
    def layout_numbers(layout: SpQRLayout) -> tuple[int, ...]:
        return layout.bits, layout.group_size, layout.stat_bits, layout.second_group

    @staticmethod
    def _check_trusted(layout: SpQRLayout, tensors: Mapping[str, Tensor]) -> None:
        PackedLinear._check_trusted(layout, tensors)
        spqr.check_statistics(layout, tensors["packed"])
        spqr.check_outliers(layout, tensors["outlier_row"], tensors["outlier"])

    def outliers(self) -> int:
        return self.outlier.numel()

    def extra_repr(self) -> str:
        share = self.outliers() / (self.layout.in_features * self.layout.out_features)
        return f"{super().extra_repr()}, outliers={share:.2%}"
