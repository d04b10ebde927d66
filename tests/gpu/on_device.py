"""A packed matrix on a device, and the ops on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_spqr import ops
from hf_spqr.formats import affine, spqr


@dataclass
class OnDevice:
    weight: spqr.SpQRWeight | affine.AffineWeight
    device: str = "cuda"

    def __post_init__(self) -> None:
        lay = self.weight.layout
        self.rows, self.columns = lay.out_features, lay.in_features
        if isinstance(self.weight, spqr.SpQRWeight):
            packed, names = spqr.pack(self.weight), (*spqr.TENSORS, "perm")
            self.numbers: tuple[Any, ...] = (lay.bits, lay.group_size, lay.stat_bits, lay.second_group)
            self._linear, self._dequantize = ops.spqr_linear, ops.spqr_dequantize
        else:
            packed, names = affine.pack(self.weight), (*affine.TENSORS, "perm")
            self.numbers = (lay.bits, lay.group_size, lay.symmetric, lay.scale_dtype == torch.bfloat16)
            self._linear, self._dequantize = ops.affine_linear, ops.affine_dequantize
        self.tensors = [None if packed.get(name) is None else packed[name].to(self.device) for name in names]

    def on(self, device: str) -> OnDevice:
        return OnDevice(self.weight, device)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._linear(x, *self.tensors, bias, self.rows, *self.numbers)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self._dequantize(*self.tensors, self.rows, self.columns, *self.numbers, dtype)

    def opcheck(self, x: Tensor) -> None:
        x = x.clone().requires_grad_()
        torch.library.opcheck(self._linear, (x, *self.tensors, None, self.rows, *self.numbers))
        numbers = (self.rows, self.columns, *self.numbers, torch.float16)
        torch.library.opcheck(self._dequantize, (*self.tensors, *numbers))
