"""The ops against float64 products of the unpacked weights, on every instruction set of this machine."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_spqr.formats import affine, spqr
from hf_spqr.formats.panels import GROUP_SIZES
from hf_spqr.methods import rtn
from hf_spqr.methods.base import AffineParams
from tests.ops.cases import ROUNDING, Case, affine_case, affine_case_of, spqr_case

DTYPES = tuple(ROUNDING)
SIZES = st.tuples(st.sampled_from([1, 5, 16, 33, 70]), st.sampled_from([1, 17, 32, 100, 256, 300, 640]))
TOKENS = st.sampled_from([1, 2, 3, 4, 7, 8, 9, 16, 24, 25, 33, 64, 65, 80])
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def inputs(case: Case, tokens: int, dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    gen = torch.Generator().manual_seed(tokens)
    n, k = case.weight.shape
    # results within the range of half precision; a matrix of zeros takes any x
    size = (case.weight.norm(dim=1).max().item() or 1.0) / 100
    x = (torch.randn(tokens, k, generator=gen) / size).to(dtype)
    return x, torch.randn(n, generator=gen).to(dtype) if bias else None


def check_dense(case: Case, dtype: torch.dtype) -> None:
    dense = case.dense(dtype)
    assert dense.dtype == dtype and dense.shape == case.weight.shape
    # s * q - s * z in place of s * (q - z) costs a rounding of s * z, which is at most the largest weight of its kind
    largest = case.weight.abs().max().item()
    if dtype == torch.float16 and largest > 65000:
        return  # random statistics of eight bits can go beyond half precision
    near = largest * 1e-5
    torch.testing.assert_close(dense.float(), case.weight, rtol=ROUNDING[dtype] + 1e-6, atol=near)


ANY_SPQR = {
    "size": SIZES, "bits": st.sampled_from(spqr.BITS), "group_size": st.sampled_from(GROUP_SIZES),
    "stat_bits": st.sampled_from(spqr.STAT_BITS), "second_group": st.sampled_from(spqr.SECOND_GROUPS),
    "share": st.sampled_from([0.0, 0.01, 0.2]), "perm": st.booleans(), "tokens": TOKENS,
    "dtype": st.sampled_from(DTYPES), "bias": st.booleans(), "seed": st.integers(0, 99),
}  # fmt: skip
ANY_AFFINE = {
    "size": SIZES, "bits": st.sampled_from(affine.BITS), "group_size": st.sampled_from(GROUP_SIZES),
    "symmetric": st.booleans(), "scale_dtype": st.sampled_from(affine.SCALE_DTYPES), "perm": st.booleans(),
    "tokens": TOKENS, "dtype": st.sampled_from(DTYPES), "bias": st.booleans(), "seed": st.integers(0, 99),
}  # fmt: skip


@EXAMPLES
@given(**ANY_SPQR)
def test_spqr(isa, size, bits, group_size, stat_bits, second_group, share, perm, tokens, dtype, bias, seed):
    case = spqr_case(spqr.SpQRLayout(*size, bits, group_size, stat_bits, second_group), share, perm, seed)
    case.check(*inputs(case, tokens, dtype, bias))
    check_dense(case, dtype)


@EXAMPLES
@given(**ANY_AFFINE)
def test_affine(isa, size, bits, group_size, symmetric, scale_dtype, perm, tokens, dtype, bias, seed):
    case = affine_case(affine.AffineLayout(*size, bits, group_size, symmetric, scale_dtype), perm, seed)
    case.check(*inputs(case, tokens, dtype, bias))
    check_dense(case, dtype)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_token_in_common_layouts(isa, bits, group_size):
    """The layouts with kernels of their own, over several panels and a ragged end."""
    for case in (
        spqr_case(spqr.SpQRLayout(88, 1000, bits, group_size), 0.01),
        affine_case(affine.AffineLayout(88, 1000, bits, group_size)),
    ):
        case.check(*inputs(case, 1, torch.float32, bias=True))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_prompts_in_common_layouts(isa, bits, group_size):
    """More tokens than are taken together, over several panels and a ragged end, with rows full of outliers."""
    spqr_weight = spqr_case(spqr.SpQRLayout(88, 1000, bits, group_size), 0.1)
    affine_weight = affine_case(affine.AffineLayout(88, 1000, bits, group_size))
    for tokens in (65, 520):
        for case in (spqr_weight, affine_weight):
            case.check(*inputs(case, tokens, torch.bfloat16, bias=True))


@pytest.mark.parametrize("group_size", [8, 16, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_batches_in_common_layouts(isa, bits, group_size):
    """Around each number of tokens at which the kernels change, and each way in which they share tokens out."""
    shares = [spqr_case(spqr.SpQRLayout(88, 1000, bits, group_size), share) for share in (0.0, 0.01, 0.2)]
    for case in (*shares, affine_case(affine.AffineLayout(88, 1000, bits, group_size))):
        for tokens in (*range(2, 18), 20, 24, 25, 32, 33, 48, 64):
            case.check(*inputs(case, tokens, torch.bfloat16, bias=True))


@pytest.mark.parametrize("tokens", [1, 4, 64])
def test_exact_to_one_in_ten_thousand(isa, tokens):
    """Relative to the result, which is what a model sees, with a few channels a hundred times larger than the rest."""
    weight = spqr.SpQRLayout(256, 2048)
    case = spqr_case(weight, 0.01)
    x, _ = inputs(case, tokens, torch.float32, bias=False)
    x[:, [7, 700]] *= 100
    expected = x.double() @ case.weight.double().T
    error = (case.run(x).double() - expected).norm() / expected.norm()
    assert error < 1e-4


@pytest.mark.parametrize(("bits", "group_size"), [(2, 128), (3, 128), (4, 32)])
@pytest.mark.parametrize("tokens", [1, 4])
def test_large_channels_cost_the_others_little(isa, tokens, bits, group_size):
    """What kernels round of x, a share of the largest value near by, must meet code - zero and not the bare code."""
    gen = torch.Generator().manual_seed(bits)
    weight = torch.randn(512, 4096, generator=gen)
    case = affine_case_of(rtn.quantize(weight, AffineParams(bits, group_size)).weight)
    x = torch.randn(tokens, 4096, generator=gen)
    x[:, [7, 700]] *= 1000
    expected = x.double() @ case.weight.double().T
    error = (case.run(x).double() - expected).norm() / expected.norm()
    assert error < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "group_size"), [(1, 16), (4, 16), (8, 16), (64, 32), (64, -1)])
def test_weights_are_not_rounded(isa, tokens, group_size, dtype):
    """Most results are the exact ones, rounded once. Were weights rounded too, every other one would differ."""
    case = spqr_case(spqr.SpQRLayout(256, 1024, 3, group_size), 0.01)
    x, _ = inputs(case, tokens, dtype, bias=False)
    expected = (x.double() @ case.weight.double().T).to(dtype)
    assert (case.run(x) == expected).double().mean() > 0.8


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_more_outliers_than_wait_for_their_products(isa, tokens):
    case = spqr_case(spqr.SpQRLayout(40, 4000), 0.5)
    case.check(*inputs(case, tokens, torch.float32, bias=False))


def test_wide_matrix_with_64_bit_outliers(isa):
    case = spqr_case(spqr.SpQRLayout(17, 66000), 0.001)
    assert case.tensors[2].dtype == torch.int64
    for tokens in (1, 3):
        case.check(*inputs(case, tokens, torch.float32, bias=False))
    for tokens in (3, 16, 65):
        case.check(*inputs(case, tokens, torch.bfloat16, bias=False))
    check_dense(case, torch.float32)


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_long_rows_of_one_sign(isa, tokens):
    """Sums grow to a size at which a single product added to them would lose most of its bits."""
    case = affine_case(affine.AffineLayout(16, 70000, 4, -1))
    x = torch.ones(tokens, 70000)
    size = case.weight.double().abs().sum(1)
    assert ((case.run(x).double() - case.weight.double().sum(1)).abs() / size).max() < 1e-5


def test_many_rows_in_stretches(isa):
    """More dequantized weights than the scratch holds: the product is taken in several stretches of rows."""
    case = affine_case(affine.AffineLayout(1300, 4096, 4, 128))
    for dtype in DTYPES:
        case.check(*inputs(case, 65, dtype, bias=True))


@pytest.mark.parametrize("shape", [(300,), (1, 300), (2, 5, 300), (0, 300), (3, 0, 300)])
def test_shapes_of_x(isa, shape):
    case = spqr_case(spqr.SpQRLayout(33, 300))
    case.check(torch.randn(shape))


def test_strided_x(isa):
    case = affine_case(affine.AffineLayout(33, 100, 3, 16))
    case.check(torch.randn(100, 6).T)
    case.check(torch.randn(4, 200)[:, ::2])
    case.check(torch.randn(100).expand(3, 100))


def test_threads_agree(isa):
    """Rows full of outliers at one end: the work is split by bytes, the result is the same."""
    layout = spqr.SpQRLayout(512, 1024)
    case = spqr_case(layout, 0.02)
    x, bias = inputs(case, 3, torch.float32, bias=True)
    one = [case.run(x[:t], bias) for t in (1, 3)]
    torch.set_num_threads(2)
    try:
        two = [case.run(x[:t], bias) for t in (1, 3)]
    finally:
        torch.set_num_threads(1)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tokens", [1, 2, 70])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_are_not_hidden(isa, tokens, value):
    case = spqr_case(spqr.SpQRLayout(32, 128))
    x = torch.randn(tokens, 128)
    x[0, 5] = value
    y = case.run(x)
    assert not y[0].isfinite().any() and y[1:].isfinite().all()


def test_a_single_token_left_after_many_calls(isa):
    """The last call takes its token in another form than those before."""
    case = affine_case(affine.AffineLayout(16, 32, 4, 32))
    case.check(*inputs(case, 511 * 512 + 1, torch.bfloat16, bias=False))


@pytest.mark.parametrize("tokens", [3, 16, 33])
def test_nothing_is_left_of_an_earlier_call(isa, tokens):
    """Rows of outliers are padded with a column of zeros, in memory that may hold anything."""
    case = spqr_case(spqr.SpQRLayout(64, 512, 3, 16), 0.01)
    x, _ = inputs(case, tokens, torch.bfloat16, bias=False)
    case.run(torch.full_like(x, float("nan")))
    case.check(x)


def test_zero_input(isa):
    case = spqr_case(spqr.SpQRLayout(32, 128))
    assert torch.equal(case.run(torch.zeros(1, 128)), torch.zeros(1, 32))
