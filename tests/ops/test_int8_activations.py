"""Activations rounded to int8: what rounding is, and that kernels which round give a product of what it gives."""

import pytest
import torch
from hypothesis import given

from hf_spqr import ops
from hf_spqr.formats import affine, spqr
from hf_spqr.formats.panels import GROUP_SIZES
from hf_spqr.ops.reference import round_activations
from tests.ops.cases import Case, affine_case, compare, spqr_case
from tests.ops.test_kernels import ANY_AFFINE, ANY_SPQR, EXAMPLES, inputs

WITH_KERNELS = ("avx512_vnni", "avx512_bf16")


def check(case: Case, isa: str, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Rounded exactly where docs/cpu.md says so, and in plain PyTorch; else the exact op to the bit."""
    tokens, (bits, group_size) = x.numel() // x.shape[-1], case.numbers[:2]
    exact = 4 if bits in (2, 3, 4, 8) and group_size != 8 else 1
    outliers = case.linear is ops.spqr_linear and case.tensors[2].numel() > 0
    y = case.run(x, bias, int8_activations=True)
    assert y.dtype == x.dtype
    most = 64 if outliers or group_size == 8 else tokens
    if isa == "reference" or (isa in WITH_KERNELS and exact < tokens <= most):
        compare(y, round_activations(x, case.tensors[-1]), case.weight, bias, rounded=False)
    elif isa != "amx":  # some of both
        assert torch.equal(y, case.run(x, bias))


@EXAMPLES
@given(**ANY_SPQR)
def test_spqr(isa, size, bits, group_size, stat_bits, second_group, share, perm, tokens, dtype, bias, seed):
    case = spqr_case(spqr.SpQRLayout(*size, bits, group_size, stat_bits, second_group), share, perm, seed)
    check(case, isa, *inputs(case, tokens, dtype, bias))


@EXAMPLES
@given(**ANY_AFFINE)
def test_affine(isa, size, bits, group_size, symmetric, scale_dtype, perm, tokens, dtype, bias, seed):
    case = affine_case(affine.AffineLayout(*size, bits, group_size, symmetric, scale_dtype), perm, seed)
    check(case, isa, *inputs(case, tokens, dtype, bias))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_several_panels_and_more_tokens_than_are_taken_together(isa, group_size):
    for case in (
        spqr_case(spqr.SpQRLayout(88, 5000, 3, group_size), 0.02),
        affine_case(affine.AffineLayout(88, 5000, 4, group_size)),
    ):
        for tokens in (13, 600):
            check(case, isa, *inputs(case, tokens, torch.bfloat16, bias=True))


def test_wide_matrix_with_64_bit_outliers(isa):
    case = spqr_case(spqr.SpQRLayout(17, 66000), 0.001)
    check(case, isa, *inputs(case, 3, torch.float32, bias=False))


def test_threads_agree(isa):
    case = spqr_case(spqr.SpQRLayout(512, 1024), 0.02)
    x, bias = inputs(case, 40, torch.float32, bias=True)
    one = case.run(x, bias, int8_activations=True)
    torch.set_num_threads(2)
    try:
        assert torch.equal(case.run(x, bias, int8_activations=True), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_are_not_hidden(isa, value):
    for case in (spqr_case(spqr.SpQRLayout(32, 300)), affine_case(affine.AffineLayout(32, 300, 4, 128))):
        x = torch.randn(3, 300)
        x[1, 5] = value
        y = case.run(x, int8_activations=True)
        assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


def test_gradient_is_that_of_the_exact_op():
    for case in (spqr_case(spqr.SpQRLayout(33, 100), perm=True), affine_case(affine.AffineLayout(33, 100, 4, 32))):
        x = torch.randn(2, 3, 100, requires_grad=True)
        torch.library.opcheck(case.linear, (x, *case.tensors, None, 33, *case.numbers, True))
        grad = torch.randn(2, 3, 33)
        case.run(x, int8_activations=True).backward(grad)
        torch.testing.assert_close(x.grad, grad @ case.weight, rtol=1e-4, atol=1e-3)


# -- round_activations


def test_a_block_has_127_steps_of_its_largest_value():
    x = torch.linspace(-3, 5, 300)
    y = round_activations(x)
    for block in (slice(0, 128), slice(128, 256), slice(256, 300)):
        scale = x[block].abs().max() / 127
        assert (y[block] - x[block]).abs().max() <= scale / 2 * (1 + 1e-5)
        assert (y[block] / scale - (y[block] / scale).round()).abs().max() < 1e-4
        assert torch.unique((y[block] / scale).round()).numel() > 20
    assert y[127] == pytest.approx(x[127].item(), abs=0.02) and y[-1] == 5


def test_ties_go_to_even():
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert round_activations(x).tolist() == [127, 0, 2, 2, 0, -2]


def test_blocks_are_those_of_the_stored_order():
    x = torch.randn(3, 300)
    perm = torch.randperm(300).int()
    stored = round_activations(x[:, perm])
    assert torch.equal(round_activations(x, perm)[:, perm], stored)
    assert not torch.equal(round_activations(x), round_activations(x, perm))


def test_tiny_blocks_are_zero_and_others_are_not_touched_by_them():
    x = torch.cat([torch.full((128,), 1e-30), torch.full((128,), 2e-30), torch.zeros(10)])
    y = round_activations(x)
    assert not y[:128].any() and not y[256:].any()
    torch.testing.assert_close(y[128:256], x[128:256], rtol=1e-6, atol=0)


def test_a_block_with_nan_or_infinity_is_nan():
    x = torch.randn(300)
    x[5], x[299] = float("nan"), float("inf")
    y = round_activations(x)
    assert y[:128].isnan().all() and y[128:256].isfinite().all() and y[256:].isnan().all()
