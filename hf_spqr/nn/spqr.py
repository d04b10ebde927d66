"""The linear module of SpQR."""

from __future__ import annotations

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
    layout: SpQRLayout
    outlier_row: Tensor
    outlier: Tensor

    @classmethod
    def from_weight(cls, weight: SpQRWeight, bias: Tensor | None, dtype: torch.dtype) -> SpQRLinear:
        """Pack ``weight``; ``dtype`` is that of the layer it replaces."""
        return cls(weight.layout, spqr.pack(weight), bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        lay = self.layout
        linear = ops.spqr_linear if self.backend == "auto" else reference.spqr_linear
        return linear(
            x, self.packed, self.outlier_row, self.outlier, self.perm, self._bias_for(x),
            lay.out_features, lay.bits, lay.group_size, lay.stat_bits, lay.second_group,
        )  # fmt: skip

    def dequantize_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        lay = self.layout
        dequantize = ops.spqr_dequantize if self.backend == "auto" else reference.spqr_dequantize
        return dequantize(
            self.packed, self.outlier_row, self.outlier, self.perm, lay.out_features, lay.in_features,
            lay.bits, lay.group_size, lay.stat_bits, lay.second_group, dtype or self.weight.dtype,
        )  # fmt: skip

    def _check_indices(self) -> None:
        super()._check_indices()
        spqr.check_outliers(self.layout, self.outlier_row, self.outlier)

    def outliers(self) -> int:
        return self.outlier.numel()
