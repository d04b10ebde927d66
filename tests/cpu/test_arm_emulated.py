"""The kernels of 64-bit ARM on emulated processors, with and without integer dot products, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.panels import GROUP_SIZES
from hf_spqr.formats.spqr import SpQRLayout
from hf_spqr.ops import reference
from tests.cpu import arm
from tests.cuda.emulator import ROOT, Case, Int8Linear, Quantize
from tests.ops.cases import ROUNDING, compare
from tests.weights import random_affine, random_spqr

F32, BF16, F16 = DTYPES = tuple(ROUNDING)
TOKENS = (1, 2, 3, 4, 5, 8, 9, 64)
Weight = spqr.SpQRWeight | affine.AffineWeight


@pytest.fixture(scope="module")
def program() -> Path:
    if (reason := arm.missing()) is not None:
        pytest.skip(reason)
    return arm.build(ROOT / "build" / "emulator")


@pytest.fixture(params=arm.PROCESSORS)
def emulated(program: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Callable:
    """``emulated(cases) -> results``"""
    return lambda cases: arm.run_on(program, request.param, cases, tmp_path)


@pytest.mark.parametrize(("processor", "level"), arm.PROCESSORS.items())
def test_the_right_kernels_are_chosen(program: Path, processor: str, level: str) -> None:
    assert arm.level(program, processor) == level


def weights() -> list[Weight]:
    """Every width with every group size, and some others."""
    found: list[Weight] = []
    for seed, (bits, group) in enumerate(product(affine.BITS, GROUP_SIZES)):
        symmetric, dtype = bool(seed % 2), (F16, BF16)[seed % 2]
        found.append(random_affine(AffineLayout(37, 300, bits, group, symmetric, dtype), bits == 3, seed))
    for seed, (bits, group) in enumerate(product(spqr.BITS, GROUP_SIZES)):
        layout = SpQRLayout(37, 300, bits, group, spqr.STAT_BITS[seed % len(spqr.STAT_BITS)], 16 << seed % 2)
        found.append(random_spqr(layout, (0.0, 0.05, 0.3)[seed % 3], bits == 3, seed))
    long = [AffineLayout(16, 4500, 4, 128), AffineLayout(20, 4500, 8, -1), AffineLayout(1, 1, 3, 16)]
    return [
        *found,
        *(random_affine(layout) for layout in long),
        random_spqr(SpQRLayout(33, 1100, 3, 16), 0.01),
        random_spqr(SpQRLayout(5, 66000, 3, 16), 0.001),  # outliers of 64 bits
    ]


def x_of(weight: Weight, tokens: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Some channels much larger than the rest."""
    gen = torch.Generator().manual_seed(seed)
    dense = weight.dequantize()
    x = torch.randn(tokens, dense.shape[1], generator=gen) / (dense.norm(dim=1).max().item() or 1.0) * 10
    x[:, :: 1 + seed % 50] *= 10
    return x.to(dtype)


def test_linears(emulated: Callable) -> None:
    cases = []
    for seed, weight in enumerate(weights()):
        for i in range(2):
            dtype = DTYPES[(seed + i) % 3]
            x = x_of(weight, TOKENS[(3 * seed + 5 * i) % len(TOKENS)], dtype, seed)
            bias = torch.randn(weight.layout.out_features).to(dtype) if seed % 3 else None
            cases.append(Case(weight, x, bias, dtype))
    for case, y in zip(cases, emulated(cases), strict=True):
        assert case.x is not None
        compare(y, case.x, case.weight.dequantize(), case.bias, rounded=False)
        if y.dtype == F32:
            assert error(y, case) < 2e-6, case.weight.layout


def error(y: Tensor, case: Case) -> float:
    assert case.x is not None
    expected = case.x.double() @ case.weight.dequantize().double().T
    if case.bias is not None:
        expected += case.bias
    return float((y.double() - expected).norm() / expected.norm())


def test_a_large_channel_costs_the_others_little(emulated: Callable) -> None:
    """A block of activations shares a scale, of so many bits that it does not show in float32."""
    gen = torch.Generator().manual_seed(0)
    cases = []
    for bits, group in ((4, 128), (3, 16), (2, -1)):
        weight = random_affine(AffineLayout(64, 1024, bits, group))
        x = torch.randn(2, 1024, generator=gen)
        x[:, 7] *= 1000
        cases.append(Case(weight, x))
    for case, y in zip(cases, emulated(cases), strict=True):
        large = case.x[:, 7:8] * case.weight.dequantize()[:, 7]  # type: ignore[index]
        rest = Case(case.weight, case.x.clone().index_fill_(1, torch.tensor(7), 0))  # type: ignore[union-attr]
        assert error((y.double() - large.double()), rest) < 2e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_stays_alone(emulated: Callable, value: float) -> None:
    cases = []
    for bits, group in ((3, 16), (4, 128), (8, -1)):
        x = torch.randn(5, 200)
        x[3, 150] = value
        cases.append(Case(random_affine(AffineLayout(40, 200, bits, group)), x))
    for y in emulated(cases):
        finite = y.isfinite()
        assert not finite[3].any() and finite[:3].all() and finite[4:].all()


def test_dense_weights(emulated: Callable) -> None:
    cases = [Case(weight, dtype=DTYPES[i % 3]) for i, weight in enumerate(weights())]
    for case, dense in zip(cases, emulated(cases), strict=True):
        want = case.weight.dequantize()
        if case.dtype == F16 and want.abs().max() > 65000:
            continue  # random statistics of eight bits can go beyond half precision
        near = want.abs().max().item() * 1e-5
        torch.testing.assert_close(dense.float(), want, rtol=ROUNDING[case.dtype] + 1e-6, atol=near)


def test_activations_become_the_same_integers(emulated: Callable) -> None:
    cases = []
    for seed, (bits, columns) in enumerate(product((2, 4, 6, 8), (1, 31, 300))):
        gen = torch.Generator().manual_seed(seed)
        x = torch.randn(3, columns, generator=gen).to(DTYPES[seed % 3])
        x[1, 0] = (0.0, float("nan"), 1e30)[seed % 3]
        perm = torch.randperm(columns, generator=gen).int() if seed % 2 else None
        cases.append(Quantize(x, perm, bits, bool(seed % 2)))
    for case, made in zip(cases, emulated(cases), strict=True):
        want = reference.quantize_activation(case.x, case.perm, case.bits, case.symmetric)
        for a, b in zip(made, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_integers_to_the_bit(emulated: Callable) -> None:
    cases: list[Any] = []
    for seed, weight in enumerate(w for w in weights() if isinstance(w, affine.AffineWeight)):
        gen = torch.Generator().manual_seed(seed)
        columns, dtype = weight.layout.in_features, DTYPES[seed % 3]
        for tokens in (TOKENS[seed % 8], TOKENS[(seed + 3) % 8]):
            x = torch.randn(tokens, columns, generator=gen)
            codes = reference.quantize_activation(x, None, 2 + seed % 7, bool(seed % 2))
            bias = torch.randn(weight.layout.out_features, generator=gen).to(dtype) if seed % 3 else None
            cases.append(Int8Linear(weight, *codes, bias, dtype))
    for case, y in zip(cases, emulated(cases), strict=True):
        want = case.expected()
        assert torch.equal(y, want) and torch.equal(y.signbit(), want.signbit()), case.weight.layout


@pytest.mark.parametrize("group_size", [32, -1])
def test_the_largest_integers(emulated: Callable, group_size: int) -> None:
    """Over more columns than int32 adds up."""
    weight = random_affine(AffineLayout(20, 70_000, 8, group_size))
    weight.codes.fill_(255)
    assert weight.zeros is not None
    weight.zeros.zero_()
    code = torch.randint(-128, 128, (6, 70_000), dtype=torch.int8)
    code[0], code[1] = 127, -128
    zero = torch.randint(-128, 128, (6, 1), dtype=torch.int32)
    zero[0], zero[1] = -128, 127
    for count in (2, 6):
        case = Int8Linear(weight, code[:count], torch.rand(count, 1), zero[:count], None, F32)
        (y,) = emulated([case])
        assert torch.equal(y, case.expected())
