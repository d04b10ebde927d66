"""The AMX kernels with emulated tiles against float64 and the reference, over shapes that fill tiles or do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout
from hf_spqr.ops import reference
from tests.cuda.emulator import Case, Int8Linear
from tests.ops.cases import compare, rounds_weights
from tests.weights import random_affine, random_spqr

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

SPQR = [
    # rows, columns, bits, group, stat bits, second group, tokens, perm, outliers
    (16, 256, 3, 16, 3, 16, 65, False, 0.01),
    (1, 1, 3, 16, 3, 16, 65, False, 0.0),
    (300, 1100, 3, 16, 3, 32, 70, True, 0.05),
    (37, 519, 2, 16, 3, 16, 96, False, 0.2),
    (40, 800, 4, 8, 4, 32, 97, True, 0.02),
    (33, 650, 3, 8, 5, 16, 129, False, 0.0),
    (130, 545, 4, 16, 2, 16, 512, False, 0.01),
    (20, 2080, 3, 32, 3, 16, 81, False, 0.05),
    (50, 700, 2, 128, 3, 32, 111, True, 0.1),
    (35, 300, 4, -1, 4, 16, 100, False, 0.03),
    (17, 70000, 3, 16, 3, 16, 66, False, 0.001),  # outliers of 64 bits
    (40, 800, 3, 16, 3, 16, 16, True, 0.05),
    (33, 650, 2, 8, 4, 32, 24, False, 0.0),
    (130, 545, 4, 16, 3, 16, 33, False, 0.2),
    (40, 2080, 3, 32, 3, 16, 16, False, 0.0),  # from here on without outliers and, but for one, exact
    (33, 1000, 2, 64, 8, 32, 33, True, 0.0),
    (50, 4200, 4, 128, 3, 16, 47, False, 0.0),
    (21, 777, 3, -1, 3, 16, 100, True, 0.0),
    (21, 777, 8, -1, 6, 16, 20, False, 0.0),
]

AFFINE = [
    # rows, columns, bits, group, symmetric, dtype of scales, tokens, perm
    (16, 4096, 4, 128, False, F16, 64, False),
    (37, 4500, 4, 128, True, BF16, 17, True),
    (140, 2100, 2, 64, False, BF16, 50, False),
    (33, 1090, 3, 32, False, F16, 31, True),
    (18, 1100, 1, 32, True, F16, 16, False),
    (37, 930, 5, 64, True, BF16, 45, False),
    (37, 930, 6, 32, False, BF16, 18, False),
    (37, 930, 7, 128, False, F16, 23, True),
    (70, 1500, 8, -1, False, BF16, 80, False),
    (16, 33, 4, -1, True, F16, 16, True),
    (1, 1, 8, 128, False, F16, 19, False),
    (100, 4500, 8, 128, False, F16, 200, False),
    (40, 900, 4, 16, False, BF16, 65, True),  # from here on rounded
    (70, 700, 3, 16, False, F16, 40, True),
    (70, 4500, 4, 128, False, BF16, 130, True),
    (70, 1200, 2, -1, True, F16, 96, True),
    (150, 555, 2, 16, True, F16, 300, False),
    (29, 290, 3, 8, False, F16, 77, False),
]


def x_and_bias(tokens: int, weight: Tensor, seed: int) -> tuple[Tensor, Tensor | None]:
    gen = torch.Generator().manual_seed(seed)
    size = (weight.norm(dim=1).max().item() or 1.0) / 100
    x = (torch.randn(tokens, weight.shape[1], generator=gen) / size).to(BF16)
    return x, torch.randn(weight.shape[0], generator=gen).to(BF16) if seed % 3 else None


def check(run: Callable, weights: list[spqr.SpQRWeight | affine.AffineWeight], tokens: list[int]) -> None:
    cases = []
    for seed, (weight, count) in enumerate(zip(weights, tokens, strict=True)):
        cases.append(Case(weight, *x_and_bias(count, weight.dequantize(), seed)))
    for case, y in zip(cases, run(cases), strict=True):
        lay, x = case.weight.layout, case.x
        assert x is not None
        rounded = rounds_weights(lay.bits, lay.group_size, x.shape[0])
        compare(y, x, case.weight.dequantize(), case.bias, rounded)


def test_spqr(run_emulated: Callable) -> None:
    weights = [random_spqr(SpQRLayout(*sizes), share, perm, 7) for *sizes, _, perm, share in SPQR]
    check(run_emulated, weights, [args[6] for args in SPQR])


def test_affine(run_emulated: Callable) -> None:
    weights = [random_affine(AffineLayout(*layout), perm, 7) for *layout, _, perm in AFFINE]
    check(run_emulated, weights, [args[6] for args in AFFINE])


@pytest.mark.parametrize("group_size", [16, 128, -1])
def test_a_token_that_is_not_finite_stays_alone(run_emulated: Callable, group_size: int) -> None:
    weight = random_affine(AffineLayout(40, 200, 4, group_size))
    for value in (float("nan"), float("inf")):
        x = torch.randn(80, 200).to(BF16)
        x[3, 5] = value
        (y,) = run_emulated([Case(weight, x)])
        finite = y.isfinite()
        assert not finite[3].any() and finite[:3].all() and finite[4:].all()


INTEGERS = [
    # rows, columns, bits, group, symmetric, dtype of scales, bits of activations, tokens, dtype
    (64, 512, 8, -1, False, F16, 8, 16, BF16),
    (70, 1000, 4, -1, True, BF16, 8, 17, F16),
    (150, 1056, 6, -1, False, F16, 6, 70, F32),
    (33, 545, 4, -1, False, F16, 4, 129, BF16),
    (1, 1, 8, -1, False, F16, 8, 16, F32),
    (17, 31, 8, -1, True, F16, 8, 31, F32),
    (40, 2080, 8, 128, False, BF16, 8, 33, BF16),
    (130, 1120, 4, 64, False, F16, 8, 45, F32),
    (37, 930, 6, 32, True, F16, 6, 64, F16),
    (37, 930, 4, 32, False, BF16, 4, 257, BF16),
    (50, 96, 3, 64, False, BF16, 5, 300, F32),
    (16, 160, 2, 128, True, F16, 7, 48, F32),
    (20, 333, 1, 32, False, F16, 2, 20, F32),
    (34, 620, 5, 128, False, F16, 3, 512, F32),
    (18, 300, 7, -1, True, F16, 8, 520, F32),
]


def test_integers_to_the_bit(run_emulated: Callable) -> None:
    cases = []
    for seed, (*layout, act_bits, tokens, dtype) in enumerate(INTEGERS):
        weight = random_affine(AffineLayout(*layout), seed=seed)
        gen = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, weight.layout.in_features, generator=gen)
        codes = reference.quantize_activation(x, None, act_bits, bool(seed % 2))
        bias = torch.randn(weight.layout.out_features, generator=gen).to(dtype) if seed % 3 else None
        cases.append(Int8Linear(weight, *codes, bias, dtype))
    for case, y in zip(cases, run_emulated(cases), strict=True):
        want = case.expected()
        assert torch.equal(y, want) and torch.equal(y.signbit(), want.signbit()), case.weight.layout


@pytest.mark.parametrize("group_size", [32, -1])
def test_the_largest_integers(run_emulated: Callable, group_size: int) -> None:
    """Over more columns than int32 adds up."""
    weight = random_affine(AffineLayout(20, 70_000, 8, group_size))
    weight.codes.fill_(255)
    assert weight.zeros is not None
    weight.zeros.zero_()
    code = torch.randint(-128, 128, (18, 70_000), dtype=torch.int8)
    code[0], code[1] = 127, -128
    zero = torch.randint(-128, 128, (18, 1), dtype=torch.int32)
    zero[0], zero[1] = -128, 127
    case = Int8Linear(weight, code, torch.rand(18, 1), zero, None, F32)
    (y,) = run_emulated([case])
    assert torch.equal(y, case.expected())
