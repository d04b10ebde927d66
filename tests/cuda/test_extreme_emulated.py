"""Statistics at the ends of what their dtypes hold: the CUDA kernels on the host against the PyTorch reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_spqr.formats.affine import AffineLayout, AffineWeight
from tests.cuda.emulator import Case
from tests.cuda.test_kernels_emulated import BF16, ERROR, F16, F32, expected, inputs, natural_affine

HUGE, TINY, INFINITE, LARGE = 3, 5, 20, 21  # rows, the others are as in a model
LAYOUTS = [(4, 128), (2, 128), (3, -1), (8, -1), (4, 64), (2, 32), (3, 16), (8, 8), (8, 64), (4, 8)]  # bits, group


def extreme_affine(bits: int, group: int, columns: int, seed: int) -> AffineWeight:
    """Rows of weights near 2^125, 2^-125 and 2^40, and infinite ones in one group, beside those of a model."""
    weight = natural_affine(AffineLayout(37, columns, bits, group, bits == 3, BF16), False, seed)
    weight.scales[HUGE] *= 2.0 ** (129 - bits)
    weight.scales[TINY] *= 2.0**-125
    weight.scales[INFINITE, -1] = torch.inf
    weight.scales[LARGE] *= 2.0**45
    return weight


@pytest.mark.parametrize("tokens", [3, 12, 20])
def test_no_row_is_spoiled_by_the_scales_of_another(run_emulated: Callable, tokens: int) -> None:
    """Each row is as exact as without the others, up to scales that are almost too large for bfloat16."""
    cases = []
    for seed, (bits, group) in enumerate(LAYOUTS):
        x = inputs(tokens, 520, 37, F32, seed)[0] / 2.0**8
        cases.append(Case(extreme_affine(bits, group, 520, seed), x.to((F32, BF16)[seed % 2]), seed=seed))
    ordinary = torch.ones(37, dtype=torch.bool).index_fill_(0, torch.tensor([HUGE, TINY, INFINITE, LARGE]), False)
    for case, y in zip(cases, run_emulated(cases), strict=True):
        y, want = y.double(), expected(case).double()
        for rows in (ordinary, HUGE, LARGE):
            error = (y - want)[:, rows].norm() / want[:, rows].norm()
            assert error < ERROR[case.out_dtype], (case.weight.layout, rows)
        assert want[:, HUGE].isfinite().all() and want[:, HUGE].abs().max() > 2.0**115
        assert y[:, TINY].abs().max() < 2.0**-110
        assert not y[:, INFINITE].isfinite().any() and not want[:, INFINITE].isfinite().any()


def test_scales_smaller_than_normal_numbers(run_emulated: Callable) -> None:
    """Down to 2^-113 nothing is lost."""
    cases = []
    for seed, (bits, group) in enumerate(LAYOUTS):
        weight = natural_affine(AffineLayout(20, 520, bits, group, False, BF16), False, seed)
        weight.scales.mul_(2.0**-107)
        for tokens in (2, 20):
            x = inputs(tokens, 520, 20, F32, seed)[0] * 2.0**60
            cases.append(Case(weight, x, seed=seed))
    for case, y in zip(cases, run_emulated(cases), strict=True):
        want = expected(case)
        assert (y - want).double().norm() < ERROR[F32] * want.double().norm(), case.weight.layout


def test_extreme_scales_as_dense_weights(run_emulated: Callable) -> None:
    """To the last bit, infinite and subnormal ones included."""
    cases = [
        Case(extreme_affine(bits, group, 100, 1), dtype=dtype) for bits, group in LAYOUTS for dtype in (F32, BF16, F16)
    ]
    for case, y in zip(cases, run_emulated(cases), strict=True):
        assert torch.equal(y.nan_to_num(7.0), case.weight.dequantize(case.dtype).nan_to_num(7.0)), case.weight.layout
