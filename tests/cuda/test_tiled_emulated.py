"""The kernel for 17 to 128 tokens on the host, against the PyTorch reference on the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout
from tests.cuda.emulator import Case, Parts
from tests.cuda.test_kernels_emulated import (
    BF16,
    ERROR,
    F16,
    F32,
    affine_case,
    check,
    expected,
    inputs,
    natural_affine,
    natural_spqr,
    spqr_case,
)

TILED = [
    # rows, columns, bits, group, stat bits, second group, tokens, dtype, perm, outliers, multiprocessors
    (200, 1100, 3, 16, 3, 16, 64, F16, False, 0.02, 6),  # two tiles of rows, columns in parts
    (60, 776, 4, 16, 3, 32, 33, BF16, True, 0.2, 4),  # more outliers than are held
    (17, 520, 2, 16, 3, 16, 128, F16, False, 0.01, 2),
    (193, 300, 3, 16, 3, 16, 17, F32, False, 0.0, 16),  # parts are at least two steps
    (40, 1024, 3, 8, 4, 16, 65, F16, False, 0.05, 2),
    (40, 1030, 4, 64, 8, 32, 100, BF16, False, 0.05, 4),
]


def test_tiles_of_tokens(run_emulated: Callable) -> None:
    """17 to 128 tokens: parts of the columns, tiles that are not full, in SpQR's layouts and affine ones."""
    cases = []
    for seed, args in enumerate(TILED):
        device = (args[-1], 99 << 10)
        cases.append(replace(spqr_case(args[:-1], seed), device=device))
        rows, columns, _, _, _, _, tokens, dtype, perm, *_ = args
        for bits, group in (((4, 128), (8, -1)), ((3, -1), (2, 16)), ((8, 128), (4, 32)))[seed % 3]:
            a = (rows, columns, bits, group, seed == 1, BF16 if seed % 2 else F16, tokens, dtype, perm)
            cases.append(replace(affine_case(a, seed), device=device))
    check(run_emulated, cases)


def test_tiles_in_every_order_of_threads(run_emulated: Callable) -> None:
    case = replace(spqr_case((40, 1100, 3, 16, 3, 16, 18, BF16, False, 0.05), 1), device=(2, 99 << 10))
    first, *others = run_emulated([replace(case, seed=seed) for seed in range(3)])
    assert all(torch.equal(first, other) for other in others)


def test_tiles_with_statistics_of_very_different_size(run_emulated: Callable) -> None:
    """Each step has its power of two; sums keep up with it, down to steps of zeros and up to outliers of 60,000."""
    layout, tokens = SpQRLayout(32, 1536), 20
    weight = natural_spqr(layout, 0.0, False, 3)
    size = torch.tensor([1.0, 1e-3, 0.0, 100.0, 1e-5, 1.0]).repeat_interleave(16)  # of the groups of each step
    second = weight.second * torch.stack([size] + [torch.ones(96)] * 3, dim=-1)[None]
    outliers = {"outlier_row": torch.tensor([0] + [1] * 16 + [2] * 16, dtype=torch.int32),
                "outlier_col": torch.tensor([600, 5], dtype=torch.int32),  # in the step of zeros, and in the first
                "outlier_value": torch.tensor([60000.0, -60000.0]).half()}  # fmt: skip
    plain = replace(weight, second=second.half())
    x = inputs(tokens, 1536, 32, F32, 3)[0]
    case = Case(replace(plain, **outliers), x)
    y, want = run_emulated([case])[0], expected(case)
    for rows in (torch.tensor([0, 16]), torch.arange(1, 16), torch.arange(17, 32)):
        assert (y - want)[:, rows].norm() <= ERROR[F32] * want[:, rows].norm()
    affine_weight = natural_affine(AffineLayout(200, 1024, 4, 128, False, BF16), False, 3)  # in one part
    size = torch.tensor([2.0**90, 1.0, 2.0**-90, 0.0]).repeat_interleave(2)
    affine_weight = replace(affine_weight, scales=(affine_weight.scales * size).bfloat16())
    case = Case(affine_weight, x[:, :1024] / 2.0**60, device=(1, 99 << 10))
    y, want = run_emulated([case])[0], expected(case)
    assert (y - want).norm() <= ERROR[F32] * want.norm()
    steps = [torch.zeros_like(x).index_fill_(1, torch.arange(256 * i, 256 * i + 256), 1.0) * x for i in range(6)]
    for i, of_step in enumerate(steps):  # nothing is lost because another step is larger
        case = Case(plain, of_step)
        y, want = run_emulated([case])[0], expected(case)
        assert (y - want).norm() <= ERROR[F32] * want.norm(), f"step {i}"


def test_parts_of_the_columns(run_emulated: Callable) -> None:
    """So many that blocks fill the device in few rounds, and none without work."""
    wanted = {
        (4096, 4096, 64): 8, (28672, 8192, 64): 3, (11008, 4096, 32): 4, (4096, 11008, 128): 6, (100, 300, 20): 1,
        (192, 65536, 17): 128, (50000, 512, 128): 1,
    }  # fmt: skip
    got = run_emulated([Parts(*shape, 132) for shape in wanted])
    assert [int(parts) for parts in got] == list(wanted.values())
    one_block, two_blocks = run_emulated([Parts(4096, 4096, 64, 132, 99 << 10), Parts(4096, 4096, 64, 66)])
    assert torch.equal(one_block, two_blocks)  # of a multiprocessor


def test_parts_know_how_many_blocks_a_multiprocessor_holds(run_emulated: Callable) -> None:
    """Statistics of groups of 8 take 27 KB of a block's 83: 164 KB hold one of these, and two of the usual layout."""
    shape, kib = (4096, 4096, 64), 1 << 10
    one, two, few = run_emulated(
        [Parts(*shape, 132, 163 * kib, group=8), Parts(*shape, 66, 163 * kib), Parts(*shape, 132, 163 * kib)]
    )
    assert int(one) == int(two) != int(few)


def outliers_at(rows: list[list[int]], seed: int) -> dict[str, Tensor]:
    """Of each row at these columns."""
    count = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
    value = torch.randn(int(count[-1]), generator=torch.Generator().manual_seed(seed))
    column = torch.tensor([column for row in rows for column in sorted(row)], dtype=torch.int32)
    return {"outlier_row": count.int(), "outlier_col": column, "outlier_value": value.half()}


@pytest.mark.parametrize(("columns", "dtype"), [(65536, F16), pytest.param(65291, F32, marks=pytest.mark.slow)])
def test_outliers_where_columns_end(run_emulated: Callable, columns: int, dtype: torch.dtype) -> None:
    """In the last step of the widest matrices, where column numbers fill their 16 bits: any number, also none."""
    weight = natural_spqr(SpQRLayout(19, columns), 0.0, False, 5)
    rows = [list(range(columns - i, columns)) for i in range(18)] + [list(range(columns - 300, columns))]
    weight = replace(weight, **outliers_at(rows, 1))
    x = torch.zeros(17, columns)
    x[:, -300:] = inputs(17, 300, 19, F32, 1)[0]
    check(run_emulated, [Case(weight, x.to(dtype), device=(40, 227 << 10))])


def test_outliers_side_by_side(run_emulated: Callable) -> None:
    """All of a step or of a half set, at the edges of steps, and rows without any among them."""
    edges = [0, 7, 8, 15, 16, 127, 128, 255, 256, 511, 512, 767, 768, 1039]
    half_set = [column for column in range(256, 512) if column & 0x90 == 0x10]
    rows = [list(range(1040)), [], edges, half_set, list(range(256, 512)), [1039], [0], []] * 5
    weight = natural_spqr(SpQRLayout(40, 1040), 0.0, False, 6)
    cases = []
    for parts_of, seed in ((1, 1), (40, 2)):  # multiprocessors: in one part and in two
        x, bias = inputs(18, 1040, 40, (F16, BF16)[seed % 2], seed)
        cases.append(Case(replace(weight, **outliers_at(rows, seed)), x, bias, device=(parts_of, 227 << 10)))
    check(run_emulated, cases)


def test_what_is_not_finite_spoils_nothing_else(run_emulated: Callable) -> None:
    """NaN and infinity in x stay in their tokens, those in outliers in their rows."""
    weight = natural_spqr(SpQRLayout(40, 600), 0.0, False, 7)
    outliers = outliers_at([[i, 300 + i] for i in range(40)], 3)
    outliers["outlier_value"][[4, 11, 20]] = torch.tensor([torch.inf, torch.nan, -torch.inf]).half()  # rows 2, 5, 10
    for dtype in (F16, F32):
        x, bias = inputs(20, 600, 40, dtype, 4)
        x[3, 17], x[7, 599], x[8, 0] = torch.nan, torch.inf, -torch.inf
        for of in (weight, replace(weight, **outliers)):
            case = Case(of, x, bias, device=(2, 227 << 10))
            (y,), want = run_emulated([case]), expected(case)
            finite = want.isfinite()
            assert torch.equal(y.isfinite(), finite) and finite.sum() == 17 * (40 if of is weight else 37)
            assert (y - want)[finite].norm() <= ERROR[dtype] * want[finite].norm()
