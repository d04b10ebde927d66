"""Layers that quantize their input: the product is the one of the integers."""

import pytest
import torch

from hf_spqr.formats.affine import AffineLayout, AffineWeight
from hf_spqr.nn import AffineLinear
from hf_spqr.ops.activation import token_grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_the_product_of_integers(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout = AffineLayout(48, 96, bits)
    codes = torch.randint(0, 2**bits, (48, 96), dtype=torch.uint8)
    scales = torch.rand(48, 1).half() * 0.1 + 0.01
    zeros = torch.randint(0, 2**bits, (48, 1), dtype=torch.uint8)
    module = AffineLinear.from_weight(AffineWeight(layout, codes, scales, zeros), None, dtype)
    x = torch.randn(2, 5, 96).to(dtype)
    plain = module(x)
    module.act_bits = bits
    scale, zero = token_grid(x, bits)
    steps = ((x.float() / scale).round() + zero).clamp(0, 2**bits - 1).long() - zero.long()
    sums = steps @ (codes.long() - zeros.long()).T  # exact
    expected = (sums.double() * scale.double() * scales.double().T).to(dtype)
    out = module(x)
    assert out.dtype == dtype and not torch.equal(out, plain)
    allowed = 1e-4 if dtype == torch.float32 else 1e-2
    assert (out - expected).abs().max() <= allowed * expected.abs().max()
    assert f"act_bits={bits}" in repr(module)
