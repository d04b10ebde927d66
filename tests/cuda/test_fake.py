"""Shapes, dtypes and devices of the ops on CUDA, traced without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_spqr import ops
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout

F32 = torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fake_cuda(dtype: torch.dtype) -> None:
    s, a = SpQRLayout(48, 300), AffineLayout(48, 300, 4, 128)
    with FakeTensorMode():
        x = torch.empty(2, 5, 300, dtype=dtype, device="cuda:1")
        row = torch.empty(49, dtype=torch.int32, device="cuda:1")
        outlier = torch.empty(7, dtype=torch.int32, device="cuda:1")
        packed = torch.empty(s.packed_shape(), dtype=torch.int32, device="cuda:1")
        y = ops.spqr_linear(x, packed, row, outlier, None, None, 48, 3, 16, 3, 16)
        weight = ops.spqr_dequantize(packed, row, outlier, None, 48, 300, 3, 16, 3, 16, dtype)
        packed = torch.empty(a.packed_shape(), dtype=torch.int32, device="cuda:1")
        y2 = ops.affine_linear(x, packed, None, None, 48, 4, 128, False, False)
        weight2 = ops.affine_dequantize(packed, None, 48, 300, 4, 128, False, False, dtype)
        code, scale, zero = ops.quantize_activation(x, None, 8, False)
        y3 = ops.w_int8_linear(code, scale, zero, packed, None, 48, 4, 128, False, False, dtype)
    for out, shape in ((y, (2, 5, 48)), (weight, (48, 300)), (y2, (2, 5, 48)), (weight2, (48, 300)), (y3, (2, 5, 48))):
        assert out.shape == shape and out.dtype == dtype and out.device == torch.device("cuda:1")
    for out, shape, kind in ((code, (2, 5, 300), torch.int8), (scale, (2, 5, 1), F32), (zero, (2, 5, 1), torch.int32)):
        assert out.shape == shape and out.dtype == kind and out.device == torch.device("cuda:1")
