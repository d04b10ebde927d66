"""Integer execution: codes of activations, and products that equal those of the integers to the last bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_spqr import ops
from hf_spqr.formats import affine
from hf_spqr.formats.tokens import MIN_SCALE, fake_quantize_activation, token_grid
from hf_spqr.ops import reference
from tests.ops.test_kernels import EXAMPLES
from tests.weights import random_affine

compiled = pytest.mark.skipif(not ops.COMPILED, reason="needs the compiled kernels")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def integer_part(weight: affine.AffineWeight, code: Tensor, zero: Tensor) -> Tensor:
    """The formula of the four sums, int64 [groups, tokens, N]."""
    width = weight.layout.in_features if weight.layout.per_channel else weight.layout.group_size
    parts = []
    for group, first in enumerate(range(0, weight.layout.in_features, width)):
        q_x, q_w = code[..., first : first + width].long(), weight.codes[:, first : first + width].long()
        z_x, z_w = zero.long(), weight.layout.middle if weight.zeros is None else weight.zeros[:, group].long()
        parts.append(q_x @ q_w.T - z_x * q_w.sum(1) - z_w * q_x.sum(-1, keepdim=True) + q_w.shape[1] * z_x * z_w)
    return torch.stack(parts)


def linear_arguments(weight: affine.AffineWeight, bias: Tensor | None, dtype: torch.dtype) -> tuple:
    lay = weight.layout
    numbers = (lay.bits, lay.group_size, lay.symmetric, lay.scale_dtype == torch.bfloat16)
    return (affine.pack(weight)["packed"], bias, lay.out_features, *numbers, dtype)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_the_grid(isa, bits, dtype):
    x = (torch.randn(2, 7, 100) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    code, scale, zero = ops.quantize_activation(x, None, bits, False)
    assert (code.dtype, scale.dtype, zero.dtype) == (torch.int8, torch.float32, torch.int32)
    assert code.shape == x.shape and scale.shape == zero.shape == (2, 7, 1)
    half = 2 ** (bits - 1)
    expected, middle = token_grid(x, bits)
    assert torch.equal(scale, expected) and torch.equal(zero, middle.int() - half)
    assert -half <= code.min().item() <= code.max().item() < half
    assert torch.equal(((code.float() - zero) * scale).to(dtype), fake_quantize_activation(x, bits))
    assert ((code.float() - zero) * scale - x.float()).abs().le(scale * 1.001).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_codes(isa, bits):
    x = torch.randn(5, 100)
    code, scale, zero = ops.quantize_activation(x, None, bits, True)
    top = 2 ** (bits - 1) - 1
    torch.testing.assert_close(scale, x.abs().amax(-1, keepdim=True) / top, rtol=0, atol=0)
    assert torch.equal(code, (x / scale).round().to(torch.int8)) and not zero.any()
    assert (code.abs().amax(-1) == top).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_columns_are_put_in_order(isa, symmetric):
    x, perm = torch.randn(3, 4, 77), torch.randperm(77).int()
    for got, expected in zip(
        ops.quantize_activation(x, perm, 8, symmetric),
        ops.quantize_activation(x[..., perm.long()], None, 8, symmetric), strict=True,
    ):  # fmt: skip
        assert torch.equal(got, expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_and_one_sided_tokens(isa, symmetric):
    x = torch.stack([torch.zeros(40), torch.rand(40) + 1, -torch.rand(40) - 1, torch.full((40,), 1e-9)])
    code, scale, zero = ops.quantize_activation(x, None, 8, symmetric)
    assert scale[0] == scale[3] == torch.tensor(MIN_SCALE)
    value = (code.float() - zero) * scale
    assert not value[0].any() and ((value - x).abs() <= scale * 0.51).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_gives_nan(isa, bad, symmetric):
    weight = random_affine(affine.AffineLayout(20, 70, 4))
    for at in (0, 33, 69):
        x = torch.randn(3, 70)
        x[1, at] = bad
        code, scale, zero = ops.quantize_activation(x, None, 8, symmetric)
        assert scale[1].isnan() and not code[1].any() and zero[1] == 0
        y = ops.w_int8_linear(code, scale, zero, *linear_arguments(weight, None, torch.bfloat16))
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_a_range_beyond_float32_gives_nan(isa):
    x = torch.tensor([[3e38, -3e38, 1.0]])
    code, scale, zero = ops.quantize_activation(x, None, 8, False)
    assert scale.isnan().all() and not code.any() and not zero.any()
    assert ops.quantize_activation(x, None, 8, True)[1].isfinite().all()


@pytest.mark.parametrize("group_size", [8, 16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_is_the_product_of_integers(isa, bits, group_size, symmetric):
    """Of the largest codes and zero points too; then the float operations that the reference names, in their order."""
    for extreme in (False, True):
        weight = random_affine(affine.AffineLayout(21, 300, bits, group_size, symmetric))
        code = torch.randint(-128, 128, (5, 300), dtype=torch.int8)
        zero = torch.randint(-128, 128, (5, 1), dtype=torch.int32)
        if extreme:
            code.fill_(127), zero.fill_(-128), weight.codes.fill_(2**bits - 1)
            if weight.zeros is not None:
                weight.zeros.zero_()
        scale, bias = torch.rand(5, 1), torch.randn(21)
        y = ops.w_int8_linear(code, scale, zero, *linear_arguments(weight, bias, torch.float32))
        sums, s_w = integer_part(weight, code, zero), weight.scales.float()
        if weight.layout.per_channel:
            expected = sums[0].float() * (scale * s_w[:, 0])
        else:
            expected = torch.zeros(5, 21)
            for group, part in enumerate(sums):
                expected = expected + part.float() * s_w[:, group]
            expected = expected * scale
        assert torch.equal(y, expected + bias)


@pytest.mark.parametrize("tokens", [2, 5, 131])
def test_more_columns_than_int32_holds(isa, tokens):
    columns = 70_000
    weight = random_affine(affine.AffineLayout(17, columns, 8))
    weight.codes.fill_(255), weight.zeros.zero_(), weight.scales.fill_(1)
    code = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8)
    code[0] = 127
    zero = torch.randint(-128, 128, (tokens, 1), dtype=torch.int32)
    zero[0] = -128
    sums = integer_part(weight, code, zero)[0]
    assert sums.abs().max() == 255 * 255 * columns > 2**31
    y = ops.w_int8_linear(code, torch.ones(tokens, 1), zero, *linear_arguments(weight, None, torch.float32))
    assert torch.equal(y, sums.float())


def same(got: Tensor, expected: Tensor) -> bool:
    return torch.equal(got, expected) and torch.equal(got.signbit(), expected.signbit())


@EXAMPLES
@given(
    rows=st.sampled_from([1, 5, 16, 33, 70, 200]), columns=st.sampled_from([1, 17, 32, 100, 256, 300, 640, 1100]),
    bits=st.integers(1, 8), act_bits=st.integers(2, 8), group_size=st.sampled_from([8, 16, 32, 64, 128, -1]),
    symmetric=st.booleans(), act_sym=st.booleans(), scale_dtype=st.sampled_from(affine.SCALE_DTYPES),
    perm=st.booleans(), tokens=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 11, 16, 17, 64, 70]),
    dtype=st.sampled_from(DTYPES), out_dtype=st.sampled_from(DTYPES), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_both_ops_are_the_reference_to_the_bit(
    isa, rows, columns, bits, act_bits, group_size, symmetric, act_sym, scale_dtype, perm, tokens, dtype, out_dtype,
    bias, seed,
):  # fmt: skip
    torch.manual_seed(seed)
    layout = affine.AffineLayout(rows, columns, bits, group_size, symmetric, scale_dtype)
    weight = random_affine(layout, perm, seed)
    x = (torch.randn(tokens, columns) * 10 ** torch.empty(tokens, 1).uniform_(-7, 2)).to(dtype)
    codes = ops.quantize_activation(x, weight.perm, act_bits, act_sym)
    expected = reference.quantize_activation(x, weight.perm, act_bits, act_sym)
    assert all(torch.equal(got, wanted) for got, wanted in zip(codes, expected, strict=True))
    arguments = linear_arguments(weight, torch.randn(rows).to(out_dtype) if bias else None, out_dtype)
    assert same(ops.w_int8_linear(*codes, *arguments), reference.w_int8_linear(*codes, *arguments))


@pytest.mark.parametrize("tokens", [128, 255, 258, 300, 520])
@pytest.mark.parametrize("group_size", [64, -1])
def test_many_tokens(isa, group_size, tokens):
    """More than share an unpacked chunk, on rows and columns that do not fill theirs."""
    weight = random_affine(affine.AffineLayout(150, 1056, 6, group_size))
    codes = ops.quantize_activation(torch.randn(tokens, 1056), None, 6, False)
    arguments = linear_arguments(weight, torch.randn(150), torch.float32)
    assert same(ops.w_int8_linear(*codes, *arguments), reference.w_int8_linear(*codes, *arguments))


def test_strided_inputs(isa):
    weight = random_affine(affine.AffineLayout(33, 100, 4))
    arguments = linear_arguments(weight, None, torch.float32)
    for x in (torch.randn(100, 6).T, torch.randn(4, 200)[:, ::2], torch.randn(100).expand(3, 100)):
        codes = ops.quantize_activation(x, None, 8, False)
        plain = ops.quantize_activation(x.contiguous(), None, 8, False)
        assert all(torch.equal(a, b) for a, b in zip(codes, plain, strict=True))
        strided = [torch.stack([t, t], -1)[..., 0] for t in codes]
        assert torch.equal(ops.w_int8_linear(*strided, *arguments), ops.w_int8_linear(*codes, *arguments))


def test_threads_agree(isa):
    weight = random_affine(affine.AffineLayout(700, 512, 8))
    x, arguments = torch.randn(70, 512), linear_arguments(weight, None, torch.float32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(
            [ops.w_int8_linear(*ops.quantize_activation(x[:t], None, 8, False), *arguments) for t in (1, 70)]
        )
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


CODES = (torch.zeros(2, 100, dtype=torch.int8), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32))


@compiled
@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.zeros(2, 100), "code must have dtype int8"),
        (0, torch.zeros((), dtype=torch.int8), "code must have at least one dimension"),
        (0, torch.zeros(2, 612, dtype=torch.int8), "packed must have shape"),
        (1, torch.ones(2, 1).double(), "scale must have dtype float32"),
        (1, torch.ones(2), "scale must have the shape of code with 1 for its last dimension"),
        (2, torch.zeros(2, 1), "zero must have dtype int32"),
        (2, torch.zeros(1, 1, dtype=torch.int32), "zero must have the shape of code with 1 for its last dimension"),
        (4, torch.zeros(33).bfloat16(), "bias must have the dtype of the result"),
        (4, torch.zeros(32), r"bias must have shape .* = \[33\]"),
        (6, 9, "bits must be 1 to 8, got 9"),
        (10, torch.float64, "dtype must be float32, bfloat16 or float16"),
        (11, 9, "act_bits must be 2 to 8, got 9"),
    ],
)
def test_wrong_arguments_of_the_product_are_named(at, value, message):
    weight = random_affine(affine.AffineLayout(33, 100, 4))
    arguments = [*CODES, *linear_arguments(weight, torch.zeros(33), torch.float32), 8]
    arguments[at] = value
    with pytest.raises(RuntimeError, match=f"w_int8_linear: {message}"):
        ops.w_int8_linear(*arguments)


@compiled
@pytest.mark.parametrize(
    ("x", "perm", "bits", "message"),
    [
        (torch.zeros(2, 8), None, 1, "bits must be 2 to 8, got 1"),
        (torch.zeros(2, 8), None, 9, "bits must be 2 to 8, got 9"),
        (torch.zeros(2, 0), None, 8, "x has no columns"),
        (torch.zeros(()), None, 8, "x must have at least one dimension"),
        (torch.zeros(2, 8, dtype=torch.int32), None, 8, "x must be float32, bfloat16 or float16"),
        (torch.zeros(2, 8), torch.zeros(7, dtype=torch.int32), 8, "perm must have shape"),
    ],
)
def test_wrong_arguments_of_the_quantizer_are_named(x, perm, bits, message):
    with pytest.raises(RuntimeError, match=f"quantize_activation: {message}"):
        ops.quantize_activation(x, perm, bits, False)


@pytest.mark.parametrize("group_size", [32, -1])
def test_opcheck(group_size):
    weight = random_affine(affine.AffineLayout(33, 100, 4, group_size), perm=True)
    for shape, dtype in (((100,), torch.float32), ((2, 3, 100), torch.bfloat16), ((0, 100), torch.float16)):
        x = torch.randn(shape).to(dtype)
        for symmetric in (False, True):
            torch.library.opcheck(ops.quantize_activation, (x, weight.perm, 8, symmetric))
        codes = ops.quantize_activation(x, weight.perm, 8, False)
        bias = torch.randn(33, dtype=dtype) if x.dim() > 1 else None
        torch.library.opcheck(ops.w_int8_linear, (*codes, *linear_arguments(weight, bias, dtype)))


def test_there_is_no_gradient_to_be_had_by_accident():
    x = torch.randn(2, 100, requires_grad=True)
    _, scale, _ = ops.quantize_activation(x, None, 8, False)
    with pytest.raises(RuntimeError, match="quantize_activation works on integers and has no gradient"):
        scale.sum().backward()


def test_the_reference_is_the_op_off_the_cpu():
    """What runs on a device without kernels of ours: the same function, here on meta tensors for its shapes."""
    x = torch.randn(2, 3, 100, device="meta")
    code, scale, zero = reference.quantize_activation(x, None, 8, False)
    assert code.shape == (2, 3, 100) and scale.shape == zero.shape == (2, 3, 1)
