"""The ops in plain PyTorch refuse what the kernels refuse, rather than broadcast or cast it. What they compute: the
other tests here, which hold the kernels against them."""

import pytest
import torch

from hf_spqr.formats import affine, spqr
from hf_spqr.ops import reference
from tests.ops.cases import affine_case, spqr_case

SPQR = spqr_case(spqr.SpQRLayout(33, 100), perm=True)
AFFINE = affine_case(affine.AffineLayout(33, 100, 4, 32))


def spqr_linear(x, bias):
    return reference.spqr_linear(x, *SPQR.tensors, bias, 33, *SPQR.numbers)


def affine_linear(x, bias):
    return reference.affine_linear(x, *AFFINE.tensors, bias, 33, *AFFINE.numbers)


@pytest.mark.parametrize("linear", [spqr_linear, affine_linear])
@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 100).double(), None, "x must be float32, bfloat16 or float16, got torch.float64"),
        (torch.zeros(2, 100).int(), None, "x must be float32, bfloat16 or float16, got torch.int32"),
        (torch.zeros(2, 100), torch.zeros(1), r"bias must be torch.float32 \[33\], got torch.float32 \[1\]"),
        (torch.zeros(2, 100), torch.zeros(33).half(), r"bias must be torch.float32 \[33\], got torch.float16 \[33\]"),
    ],
)
def test_linears(linear, x, bias, message):
    with pytest.raises(ValueError, match=message):
        linear(x, bias)


@pytest.mark.parametrize(("case", "op"), [(SPQR, reference.spqr_dequantize), (AFFINE, reference.affine_dequantize)])
def test_dense_weights_of_other_dtypes(case, op):
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16 or float16, got torch.int8"):
        op(*case.tensors, 33, 100, *case.numbers, torch.int8)


@pytest.mark.parametrize(
    ("x", "perm", "bits", "message"),
    [
        (torch.zeros(2, 100), None, 1, "bits must be 2 to 8, got 1"),
        (torch.zeros(2, 100).double(), None, 8, "x must be float32, bfloat16 or float16, got torch.float64"),
        (torch.zeros(2, 100), torch.arange(50).int(), 8, r"perm must be torch.int32 \[100\], got torch.int32 \[50\]"),
        (torch.zeros(2, 100), torch.arange(100), 8, r"perm must be torch.int32 \[100\], got torch.int64 \[100\]"),
    ],
)
def test_activations(x, perm, bits, message):
    with pytest.raises(ValueError, match=message):
        reference.quantize_activation(x, perm, bits, True)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("code", torch.zeros(2, 100, dtype=torch.uint8), r"code must be torch.int8 \[2, 100\], got torch.uint8"),
        ("scale", torch.zeros(1, 1), r"scale must be torch.float32 \[2, 1\], got torch.float32 \[1, 1\]"),
        ("zero", torch.zeros(2, 1), r"zero must be torch.int32 \[2, 1\], got torch.float32"),
        ("bias", torch.zeros(1), r"bias must be torch.float32 \[33\], got torch.float32 \[1\]"),
        ("dtype", torch.float64, "dtype must be float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_integers(argument, value, message):
    code, scale, zero = reference.quantize_activation(torch.randn(2, 100), None, 8, False)
    tensors = {"code": code, "scale": scale, "zero": zero, "bias": None, "dtype": torch.float32} | {argument: value}
    code, scale, zero, bias, dtype = tensors.values()
    with pytest.raises(ValueError, match=message):
        reference.w_int8_linear(code, scale, zero, AFFINE.tensors[0], bias, 33, *AFFINE.numbers, dtype)
