"""The integer kernels on the host, under AddressSanitizer and UBSan: the PyTorch reference to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_spqr.formats.affine import AffineLayout
from hf_spqr.ops import reference
from tests.cuda.emulator import SMALLEST_DEVICE, Int8Linear, Quantize
from tests.weights import random_affine

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def some_tokens(tokens: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Of very different sizes, one of zeros, one of positive and one of tiny numbers where there are so many."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=gen) * 10 ** (torch.rand(tokens, 1, generator=gen) * 6 - 3)
    for at, value in ((1, torch.zeros(columns)), (2, torch.rand(columns, generator=gen) + 1), (3, x[0] * 1e-9)):
        if tokens > at:
            x[at] = value
    return x.to(dtype)


QUANTIZE = [
    # tokens, columns, bits, symmetric, dtype, perm, offset
    (5, 256, 8, False, F16, False, 0),
    (5, 4096, 8, False, BF16, False, 0),
    (5, 2048, 4, False, F32, False, 0),
    (4, 2048, 6, True, F32, False, 0),
    (4, 77, 8, True, BF16, True, 0),
    (4, 80, 3, False, F16, True, 0),
    (4, 264, 2, False, F16, False, 2),
    (4, 264, 2, True, F32, False, 4),
    (1, 17000, 8, False, F16, False, 0),
    (65, 5000, 4, True, BF16, False, 0),
    (1, 1, 5, False, F32, False, 0),
    (2, 5000, 7, False, BF16, True, 2),
]


def quantize_case(args: tuple, seed: int) -> Quantize:
    tokens, columns, bits, symmetric, dtype, perm, offset = args
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)).int() if perm else None
    return Quantize(some_tokens(tokens, columns, dtype, seed), order, bits, symmetric, offset)


def check_quantize(run: Callable, cases: list[Quantize]) -> None:
    for case, got in zip(cases, run(cases), strict=True):
        want = reference.quantize_activation(case.x, case.perm, case.bits, case.symmetric)
        for mine, reference_s in zip(got, want, strict=True):
            assert torch.equal(mine, reference_s)


def test_quantize(run_emulated: Callable) -> None:
    check_quantize(run_emulated, [quantize_case(args, seed) for seed, args in enumerate(QUANTIZE)])


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantize_tokens_that_are_not_finite(run_emulated: Callable, symmetric: bool) -> None:
    nan = float("nan")
    minus_nan = torch.tensor(0xFFC00000 - 2**32, dtype=torch.int32).view(F32).item()
    cases = []
    for columns in (100, 264):
        x = torch.randn(6, columns)
        for token, bad in enumerate((nan, minus_nan, float("inf"), -float("inf"), 3e38)):
            x[token, 17 * token] = bad
        x[4, 0] = -3e38  # a range beyond float32, if asymmetric
        cases.append(Quantize(x, None, 8, symmetric))
    for case, (code, scale, zero) in zip(cases, run_emulated(cases), strict=True):
        want = reference.quantize_activation(case.x, None, 8, symmetric)
        assert torch.equal(code, want[0]) and torch.equal(zero, want[2])
        assert torch.equal(scale.isnan(), want[1].isnan()) and torch.equal(scale.nan_to_num(), want[1].nan_to_num())
        assert want[1].isnan().sum() == (4 if symmetric else 5)


LINEAR = [
    # rows, columns, bits, group, symmetric, scale dtype, tokens, dtype: few tokens, then many
    (16, 256, 8, -1, False, F16, 1, F32),
    (1, 1, 4, -1, False, F16, 1, F16),
    (37, 900, 4, -1, False, BF16, 8, F16),
    (37, 2320, 6, -1, True, F16, 3, BF16),
    (48, 4500, 8, -1, True, F16, 7, F16),
    (33, 520, 2, -1, False, F16, 11, F32),
    (33, 777, 3, -1, False, F16, 16, F16),
    (70, 300, 5, -1, True, F16, 20, BF16),
    (130, 1040, 7, -1, False, F16, 64, F16),
    (17, 300, 1, -1, False, F16, 33, F16),
    (37, 900, 4, 128, False, F16, 5, F32),
    (37, 900, 8, 128, True, F16, 2, F16),
    (37, 600, 6, 64, False, BF16, 9, F32),
    (37, 4500, 4, 128, False, BF16, 3, F32),
    (37, 2600, 5, 64, True, F16, 14, F32),
    (70, 1300, 4, 128, False, F16, 30, F32),
    (20, 2600, 8, 32, False, F16, 12, F32),
    (20, 333, 4, 32, False, F16, 1, F16),
    (20, 333, 3, 16, True, F16, 4, F32),
    (20, 333, 2, 8, False, F16, 17, F16),
    (20, 5000, 7, 8, False, F16, 2, F32),
    (200, 384, 8, -1, False, F16, 65, F16),
    (129, 300, 4, -1, False, F16, 150, BF16),
    (40, 272, 6, -1, True, F16, 257, F32),
    (130, 200, 3, -1, False, BF16, 70, F16),
    (130, 700, 4, 128, False, F16, 100, F16),
    (70, 300, 8, 32, False, F16, 80, F32),
    (35, 4400, 4, 128, False, F16, 65, F16),
    (150, 2200, 6, 64, True, BF16, 70, F32),
    (40, 300, 2, 8, True, F16, 70, BF16),
]


def linear_case(args: tuple, seed: int, extreme: bool = False) -> Int8Linear:
    rows, columns, bits, group, symmetric, scale_dtype, tokens, dtype = args
    weight = random_affine(AffineLayout(rows, columns, bits, group, symmetric, scale_dtype), seed=seed)
    gen = torch.Generator().manual_seed(seed)
    code = torch.randint(-128, 128, (tokens, columns), generator=gen, dtype=torch.int8)
    zero = torch.randint(-128, 128, (tokens, 1), generator=gen, dtype=torch.int32)
    if extreme:
        code.fill_(127), zero.fill_(-128), weight.codes.fill_(2**bits - 1)
        if weight.zeros is not None:
            weight.zeros.zero_()
    bias = torch.randn(rows, generator=gen).to(dtype) if seed % 2 else None
    return Int8Linear(weight, code, torch.rand(tokens, 1, generator=gen) * 1e-3, zero, bias, dtype, seed)


def check(run: Callable, cases: list[Int8Linear]) -> None:
    for case, y in zip(cases, run(cases), strict=True):
        want = case.expected()
        assert torch.equal(y, want), f"{case.weight.layout}, {case.code.shape[0]} tokens"


def test_linear(run_emulated: Callable) -> None:
    check(run_emulated, [linear_case(args, seed) for seed, args in enumerate(LINEAR)])


@pytest.mark.parametrize("multiprocessors", [1, 4, 8])
def test_tiles_for_many_tokens(run_emulated: Callable, multiprocessors: int) -> None:
    """The fewer multiprocessors, the larger the tiles that are chosen."""
    device = (multiprocessors, SMALLEST_DEVICE[1])
    shapes = [(200, 300, 4, group, False, F16, 250, F16) for group in (-1, 64)]
    check(run_emulated, [replace(linear_case(shape, 1), device=device) for shape in shapes])


HALF_BYTES = [
    # rows, columns, symmetric, scale dtype, tokens, dtype, multiprocessors
    (16, 32, False, F16, 65, F32, 3),
    (200, 384, False, F16, 250, F16, 1),
    (129, 300, True, F16, 150, BF16, 3),
    (130, 777, False, BF16, 129, F16, 8),
    (33, 40, False, F16, 66, F16, 3),
    (70, 1, True, F16, 100, F32, 1),
]


def half_byte_case(args: tuple, seed: int, act_bits: int = 4) -> Int8Linear:
    """Weights of 4 bits and activations of ``act_bits``, on few multiprocessors in large tiles."""
    rows, columns, symmetric, scale_dtype, tokens, dtype, multiprocessors = args
    case = linear_case((rows, columns, 4, -1, symmetric, scale_dtype, tokens, dtype), seed)
    half = 2 ** (act_bits - 1)
    code = torch.randint(-half, half, case.code.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    return replace(case, code=code, act_bits=act_bits, device=(multiprocessors, SMALLEST_DEVICE[1]))


def test_half_bytes(run_emulated: Callable) -> None:
    """Codes of 4 bits on both sides, many tokens: tensor cores of int4, of 4 and of 3 bits."""
    cases = [half_byte_case(args, seed, 4 - seed % 2) for seed, args in enumerate(HALF_BYTES)]
    largest = half_byte_case(HALF_BYTES[1], 1)
    largest.code.fill_(-8), largest.weight.codes.fill_(15)
    largest.code[1] = 7
    check(run_emulated, [*cases, largest])


def test_codes_that_do_not_fit_half_bytes_show_that_those_kernels_run(run_emulated: Callable) -> None:
    """Of codes beyond what ``act_bits`` promises four bits are taken; with 8 bits, and for few tokens, all of them."""
    case = half_byte_case(HALF_BYTES[0], 1)
    case.code[3, 5] += 16
    wrapped, whole, few = run_emulated([case, replace(case, act_bits=8), few_tokens(case, 64)])
    assert not torch.equal(wrapped[3], whole[3]) and torch.equal(wrapped[4:], whole[4:])
    assert torch.equal(whole, case.expected()) and torch.equal(few, whole[:64])


def few_tokens(case: Int8Linear, tokens: int) -> Int8Linear:
    return replace(case, code=case.code[:tokens], scale=case.scale[:tokens], zero=case.zero[:tokens])


def test_largest_codes(run_emulated: Callable) -> None:
    chosen = (0, 4, 9, 11, 15, 19, 20, 21, 22)
    check(run_emulated, [linear_case(LINEAR[i], 1, extreme=True) for i in chosen])


@pytest.mark.parametrize("columns", [33040, 70_000])
def test_more_columns_than_int32_holds(run_emulated: Callable, columns: int) -> None:
    """Beyond 33,025 columns the result, beyond 65,536 the terms; one row and token of the greatest size."""
    for tokens in (2, 65) if columns < 65536 else (2,):
        case = linear_case((17, columns, 8, -1, False, F16, tokens, F32), 1)
        case.weight.codes[3], case.weight.zeros[3] = 255, 0
        case.code[1], case.zero[1] = 127, -128
        assert 255 * 255 * columns > 2**31
        check(run_emulated, [case])


def test_a_token_without_a_grid_gives_nan(run_emulated: Callable) -> None:
    for args in (LINEAR[2], LINEAR[10], LINEAR[-7]):
        case = linear_case(args, 1)
        case.scale[1] = float("nan")
        (y,) = run_emulated([case])
        assert y[1].isnan().all() and y[0].isfinite().all()


def test_every_order_of_threads_gives_the_same_bits(run_emulated: Callable) -> None:
    for args in (LINEAR[2], LINEAR[8], LINEAR[14], LINEAR[17], LINEAR[-6], LINEAR[-3]):
        case = linear_case(args, 3)
        first, *others = run_emulated([replace(case, seed=seed) for seed in range(3)])
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(run_emulated: Callable, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=gen))]

    rows, columns = (int(torch.randint(1, most, (1,), generator=gen)) for most in (150, 2000))
    args = (
        rows, columns, pick(*range(1, 9)), pick(-1, -1, 8, 16, 32, 64, 128), pick(True, False), pick(F16, BF16),
        pick(1, 2, 5, 8, 9, 16, 17, 40, 64, 65, 140), pick(F16, BF16, F32),
    )  # fmt: skip
    check(run_emulated, [linear_case(args, seed)])
    args = (pick(1, 2, 7), columns, pick(*range(2, 9)), pick(True, False), pick(F16, BF16, F32), pick(True, False),
            pick(0, 4))  # fmt: skip
    check_quantize(run_emulated, [quantize_case(args, seed)])
