"""The CUDA kernels on the host, under AddressSanitizer and UBSan, against the PyTorch reference on the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout
from hf_spqr.ops import reference
from tests.cuda.emulator import SMALLEST_DEVICE, Case, Finish, Stretch
from tests.weights import random_affine, random_spqr

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ERROR = {F32: 1e-3, F16: 1e-3, BF16: 4e-3}  # root mean square, relative; weights are fp16 in the tensor cores


def natural_spqr(layout: SpQRLayout, share: float, perm: bool, seed: int) -> spqr.SpQRWeight:
    """Statistics as they are in a model: scales near 0.01, zero points near the middle of the codes."""
    weight = random_spqr(layout, share, perm, seed)
    second = torch.rand(weight.second.shape, generator=torch.Generator().manual_seed(seed))
    levels = 1 << layout.stat_bits
    low = torch.tensor([0.02 / levels, -12.0 * levels / 8, 4.0 / levels, -1.5 * levels / 8])
    high = torch.tensor([0.04 / levels, -6.0 * levels / 8, 6.0 / levels, 0.0])
    return replace(weight, second=(low + second * (high - low)).half(), outlier_value=weight.outlier_value * 0.1)


def natural_affine(layout: AffineLayout, perm: bool, seed: int) -> affine.AffineWeight:
    weight = random_affine(layout, perm, seed)
    return replace(weight, scales=(weight.scales * 0.03).to(layout.scale_dtype))


def inputs(tokens: int, columns: int, rows: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=gen) * torch.rand(tokens, 1, generator=gen) * 4
    return x.to(dtype), torch.randn(rows, generator=gen).to(dtype)


def expected(case: Case) -> Tensor:
    """By the reference op, in float32."""
    lay, x = case.weight.layout, case.x
    assert x is not None
    bias = None if case.bias is None else case.bias.float()
    if isinstance(case.weight, spqr.SpQRWeight):
        t = spqr.pack(case.weight)
        return reference.spqr_linear(
            x.float(), t["packed"], t["outlier_row"], t["outlier"], t.get("perm"), bias, lay.out_features, lay.bits,
            lay.group_size, lay.stat_bits, lay.second_group,
        )  # fmt: skip
    t = affine.pack(case.weight)
    return reference.affine_linear(
        x.float(), t["packed"], t.get("perm"), bias, lay.out_features, lay.bits, lay.group_size, lay.symmetric,
        lay.scale_dtype == BF16,
    )  # fmt: skip


def check(run: Callable, cases: list[Case]) -> None:
    for case, y in zip(cases, run(cases), strict=True):
        want = expected(case)
        error = ((y.float() - want).norm() / want.norm()).item()
        assert error < ERROR[case.out_dtype], f"{case.weight.layout}: relative error {error:.2e}"


# tokens from 1 to 64 take four kernels; rows and columns of every raggedness; the usual layout and all others
SPQR = [
    # rows, columns, bits, group, stat bits, second group, tokens, dtype, perm, outliers
    (16, 256, 3, 16, 3, 16, 1, F16, False, 0.01),
    (1, 1, 3, 16, 3, 16, 1, F16, False, 0.0),
    (37, 519, 3, 16, 3, 32, 8, BF16, True, 0.05),
    (48, 2304, 3, 16, 3, 16, 3, F16, False, 0.01),
    (17, 130, 2, 16, 3, 16, 2, F32, True, 0.2),
    (40, 1000, 4, 16, 3, 32, 16, F16, False, 0.01),
    (80, 1000, 2, 16, 3, 16, 30, BF16, False, 0.1),
    (65, 776, 3, 16, 3, 16, 64, F16, False, 0.01),
    (33, 700, 3, 8, 4, 16, 5, F16, False, 0.01),
    (33, 700, 3, 8, 3, 32, 12, F16, True, 0.01),
    (33, 700, 4, 128, 8, 32, 5, F16, False, 0.01),
    (20, 5000, 3, 64, 3, 16, 9, BF16, False, 0.01),
    (33, 700, 2, -1, 5, 16, 7, F16, False, 0.01),
    (33, 700, 4, 32, 6, 16, 20, F32, False, 0.01),
    (20, 4100, 3, 16, 4, 16, 1, F16, False, 0.01),
]
AFFINE = [
    # rows, columns, bits, group, symmetric, scale dtype, tokens, dtype, perm
    (16, 256, 4, 128, False, F16, 1, F16, False),
    (37, 4500, 4, 128, False, BF16, 7, BF16, True),
    (37, 8200, 3, 128, False, F16, 2, F16, False),
    (70, 300, 3, 128, False, F16, 12, F16, True),
    (37, 300, 2, 128, True, F16, 20, F32, False),
    (37, 900, 8, 128, False, F16, 1, F16, False),
    (37, 900, 8, -1, True, F16, 10, F16, False),
    (37, 900, 4, -1, False, BF16, 2, BF16, False),
    (37, 900, 3, -1, True, F16, 33, F16, False),
    (37, 900, 2, -1, False, F16, 1, F32, True),
    (37, 900, 4, 64, False, BF16, 2, F16, False),
    (37, 900, 8, 32, False, F16, 2, F16, False),
    (37, 900, 3, 16, True, F16, 14, F16, False),
    (37, 900, 2, 8, False, F16, 64, F16, False),
    (5, 77, 4, 128, False, F16, 1, F16, False),
]


def spqr_case(args: tuple, seed: int) -> Case:
    rows, columns, bits, group, stat_bits, second, tokens, dtype, perm, share = args
    weight = natural_spqr(SpQRLayout(rows, columns, bits, group, stat_bits, second), share, perm, seed)
    return Case(weight, *inputs(tokens, columns, rows, dtype, seed), seed=seed)


def affine_case(args: tuple, seed: int) -> Case:
    rows, columns, bits, group, symmetric, scale_dtype, tokens, dtype, perm = args
    weight = natural_affine(AffineLayout(rows, columns, bits, group, symmetric, scale_dtype), perm, seed)
    x, bias = inputs(tokens, columns, rows, dtype, seed)
    return Case(weight, x, bias if seed % 2 else None, seed=seed)


def test_spqr_linear(run_emulated: Callable) -> None:
    check(run_emulated, [spqr_case(args, seed) for seed, args in enumerate(SPQR)])


def test_affine_linear(run_emulated: Callable) -> None:
    check(run_emulated, [affine_case(args, seed) for seed, args in enumerate(AFFINE)])


DEVICES = [(1, 227 << 10), (2, 163 << 10), (1, 99 << 10)]
"""From two groups of warps that share x to one that takes it in stretches, with row blocks for two batches of sums."""


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_few_tokens_on_any_device(run_emulated: Callable, tokens: int) -> None:
    """Several row blocks per group, x in stretches, sums that wait: the same numbers whatever the device has."""
    cases = []
    for seed, device in enumerate(DEVICES):
        rows, columns = ((300, 700), (150, 4616), (150, 2700))[seed]
        for bits in (3, (2, 4)[seed % 2]):
            weight = natural_spqr(SpQRLayout(rows, columns, bits), (0.03, 0.1, 0.0)[seed], seed == 1, seed)
            x, bias = inputs(tokens, columns, rows, (F16, BF16, F32)[seed], seed)
            cases.append(Case(weight, x, bias, seed=seed, device=device))
        for bits, group in ((4, 128), (3, 128), (8, -1)):
            weight = natural_affine(AffineLayout(rows, columns, bits, group, seed == 2), seed == 3, seed)
            x, bias = inputs(tokens, columns, rows, (F16, BF16, F32)[(seed + bits) % 3], seed)
            cases.append(Case(weight, x, bias, seed=seed, device=device))
    check(run_emulated, cases)


SIXTEEN = [
    # rows, columns, bits, tokens, dtype, perm, outliers
    (100, 1032, 3, 9, BF16, True, 0.1),
    (70, 4096, 3, 16, F16, False, 0.01),
    (300, 500, 2, 13, F32, False, 0.05),
    (40, 777, 4, 15, BF16, False, 0.0),
]


def test_sixteen_tokens_in_shared_memory(run_emulated: Callable) -> None:
    """More than eight in one block: a second tile of tokens, full and not, in all layouts that have the kernel."""
    cases, device = [], (2, 227 << 10)
    for seed, (rows, columns, bits, tokens, dtype, perm, share) in enumerate(SIXTEEN):
        x, bias = inputs(tokens, columns, rows, dtype, seed)
        weight = natural_spqr(SpQRLayout(rows, columns, bits), share, perm, seed)
        cases.append(Case(weight, x, bias, seed=seed, device=device))
        for group in (128, -1):
            weight = natural_affine(AffineLayout(rows, columns, (8, 4, 3, 2)[seed], group, seed == 1), perm, seed)
            cases.append(Case(weight, x, bias, seed=seed, device=device))
    check(run_emulated, cases)


@pytest.mark.parametrize("tokens", [1, 7, 12, 20])
@pytest.mark.parametrize("group", [32, 64])
def test_groups_of_whole_tiles(run_emulated: Callable, group: int, tokens: int) -> None:
    """Several panels, the last of them short, down to one group: then a step has scales for one of its two sets."""
    cases = []
    for seed, bits in enumerate((2, 3, 4, 8)):
        for device, columns in ((SMALLEST_DEVICE, 33 * group + 8), ((1, 227 << 10), 71 * group)):
            layout = AffineLayout(50, columns, bits, group, seed % 3 == 2, (BF16, F16)[seed % 2])
            x, bias = inputs(tokens, columns, 50, (F16, BF16)[(tokens + bits) % 2], seed)
            cases.append(Case(natural_affine(layout, bits == 8, seed), x, bias, seed=seed, device=device))
    check(run_emulated, cases)


@pytest.mark.parametrize("tokens", [12, 16])
def test_many_rows_share_x(run_emulated: Callable, tokens: int) -> None:
    """On a device with one multiprocessor a few hundred rows are many."""
    rows, columns, device = 200, 2100, (1, 99 << 10)
    x, bias = inputs(tokens, columns, rows, F16, tokens)
    weights = [
        natural_spqr(SpQRLayout(rows, columns), 0.02, False, 1),
        natural_spqr(SpQRLayout(rows, columns, 4, 64), 0.02, tokens == 16, 2),
        natural_affine(AffineLayout(rows, columns, 4, 128), False, 3),
        natural_affine(AffineLayout(rows, columns, 8, -1), tokens == 12, 4),
        natural_affine(AffineLayout(rows, columns, 2, 64), False, 5),
    ]
    check(run_emulated, [Case(weight, x, bias, seed=tokens, device=device) for weight in weights])


def test_statistics_of_any_size(run_emulated: Callable) -> None:
    """Scales of both signs and very different sizes: the power of two that fits them into fp16 is found per step."""
    layout = SpQRLayout(32, 600)
    cases = []
    for seed, size in enumerate((1e-4, 1.0, 300.0)):
        weight = random_spqr(layout, 0.01, seed=seed)
        weight = replace(weight, second=weight.second * torch.tensor([size, 1, 1, 1], dtype=F16))
        cases.append(Case(weight, inputs(4, 600, 32, F32, seed)[0], seed=seed))
    check(run_emulated, cases)


def test_large_and_small_tokens(run_emulated: Callable) -> None:
    """bf16 and fp32 beyond the range of fp16, in one batch with tokens far below it."""
    weight = natural_spqr(SpQRLayout(32, 512), 0.01, False, 3)
    x = inputs(3, 512, 32, F32, 3)[0] * torch.tensor([[1e20], [1e-20], [1.0]])
    for dtype in (F32, BF16):
        case = Case(weight, x.to(dtype), seed=3)
        y, want = run_emulated([case])[0].double(), expected(case).double()
        error = (y - want).norm(dim=1) / want.norm(dim=1)
        assert error.max() < ERROR[dtype]


def test_zeros_give_bias(run_emulated: Callable) -> None:
    weight = natural_spqr(SpQRLayout(20, 300), 0.01, False, 4)
    bias = torch.arange(20.0)
    (y,) = run_emulated([Case(weight, torch.zeros(2, 300), bias)])
    assert torch.equal(y, bias.expand(2, 20))


def test_last_column_of_the_widest_matrix(run_emulated: Callable) -> None:
    """Column indices of outliers are 16 bits wide up to 65,536 columns."""
    columns = 65536
    weight = natural_spqr(SpQRLayout(3, columns), 0.0001, False, 5)
    last = torch.full((3,), columns - 1, dtype=torch.int32)
    weight = replace(
        weight,
        outlier_row=torch.arange(4, dtype=torch.int32),
        outlier_col=last,
        outlier_value=torch.full((3,), 50.0).half(),
    )
    x = torch.zeros(1, columns, dtype=F16)
    x[0, -1] = 1
    case = Case(weight, x)
    check(run_emulated, [case])


def test_every_order_of_threads_gives_the_same_bits(run_emulated: Callable) -> None:
    """A missing barrier, or a sum in the order of arrival, would show."""
    for case in (spqr_case(SPQR[5], 5), spqr_case(SPQR[4], 4), affine_case(AFFINE[9], 9)):
        first, *others = run_emulated([replace(case, seed=seed) for seed in range(3)])
        assert all(torch.equal(first, other) for other in others)


def dequantize_cases() -> list[Case]:
    cases = []
    variants = [(16, 3, 16, F16, False), (8, 2, 32, BF16, True), (-1, 5, 16, F32, False), (64, 8, 32, F32, True)]
    for bits in range(1, 9):
        for j, (group, stat_bits, second, dtype, perm) in enumerate(variants):
            rows, columns = (35, 601) if j else (32, 1040)
            if bits > 1:
                layout = SpQRLayout(rows, columns, bits, group, stat_bits, second)
                cases.append(Case(random_spqr(layout, 0.1, perm, bits), dtype=dtype, first_row=16 if j == 1 else 0))
            scale_dtype = F16 if j < 2 else BF16
            weight = random_affine(AffineLayout(rows, columns, bits, group, j % 2 == 1, scale_dtype), perm, bits)
            cases.append(Case(weight, dtype=dtype, part_rows=16 if j == 2 else None))
    # int64 outliers; rows with very many and with none; a last panel of one group; statistics shared by two groups
    wide = random_spqr(SpQRLayout(2, 65600), 0.0005, seed=9)
    full = random_spqr(SpQRLayout(17, 1100, 3), 0.9, seed=10)
    few = random_spqr(SpQRLayout(40, 2072, 2), 0.001, seed=11)
    short = random_spqr(SpQRLayout(20, 1034, 4, 16, 3, 32), 0.05, seed=12)
    return [*cases, Case(wide, dtype=F32), Case(full, dtype=F16), Case(few, dtype=BF16), Case(short, dtype=F16)]


def test_dequantize_is_exact(run_emulated: Callable) -> None:
    """To the last bit, for every width, dtype and part of the rows."""
    cases = dequantize_cases()
    for case, y in zip(cases, run_emulated(cases), strict=True):
        want = case.weight.dequantize(case.dtype)[case.first_row : case.first_row + case.rows]
        assert torch.equal(y, want), case.weight.layout


def test_outliers_beside_each_other(run_emulated: Callable) -> None:
    """All of a row's outliers in one block of columns, at its edges, and none elsewhere."""
    weight = random_spqr(SpQRLayout(16, 2048), 0.0, seed=13)
    ends = torch.tensor([511, 512, 1023, 1024, 2047])
    columns = [torch.arange(0, 40), torch.arange(500, 530), ends, torch.arange(2048)]
    counts = torch.tensor([len(columns[row % 4]) for row in range(16)])
    weight = replace(
        weight,
        outlier_row=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int(),
        outlier_col=torch.cat([columns[row % 4] for row in range(16)]).int(),
        outlier_value=torch.randn(int(counts.sum()), generator=torch.Generator().manual_seed(1)).half(),
    )
    (y,) = run_emulated([Case(weight, dtype=F16)])
    assert torch.equal(y, weight.dequantize(F16))


def test_stretches_fill_the_device(run_emulated: Callable) -> None:
    """On 132 multiprocessors: whole where that takes no more waves, otherwise cut so that few blocks are left over."""
    wanted = {
        (4096, 4096, 512): 4096, (11008, 4096, 512): 11008, (4096, 11008, 512): 4096, (28672, 8192, 512): 4096,
        (100, 300, 65): 112, (1, 7, 100): 16, (50000, 65536, 100): 768, (40, 67108863, 100): 16,
    }  # fmt: skip
    got = run_emulated([Stretch(*shape, 132) for shape in wanted])
    assert [int(rows) for rows in got] == list(wanted.values())


def test_finish(run_emulated: Callable) -> None:
    """After a dense product: scale, bias and dtype, for some of the rows; after products of parts, their sum, too."""
    product, scale, bias = torch.randn(3, 300).half(), torch.tensor([0.5, 2.0, 1e-3]), torch.randn(700)
    for dtype in (F32, BF16, F16):
        y = torch.zeros(3, 700, dtype=dtype)
        (got,) = run_emulated([Finish(product, scale, bias.to(dtype), y, first_row=320)])
        want = (product.float() * scale[:, None] + bias.to(dtype).float()[320:620]).to(dtype)
        assert torch.equal(got[:, 320:620], want) and not got[:, :320].any() and not got[:, 620:].any()
    parts = torch.randn(3, 2, 48)
    (got,) = run_emulated([Finish(parts, torch.tensor([2.0, 0.5]), None, torch.zeros(2, 40))])
    assert torch.equal(got, (parts[0] + parts[1] + parts[2])[:, :40] * torch.tensor([[2.0], [0.5]]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(run_emulated: Callable, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=gen))]

    rows, columns = (int(torch.randint(1, most, (1,), generator=gen)) for most in (100, 3000))
    tokens, dtype, perm, group = (
        pick(1, 2, 5, 8, 9, 16, 17, 40, 90),
        pick(F16, BF16, F32),
        pick(True, False),
        pick(-1, 8, 16, 16, 32, 64, 128),
    )
    a = (
        rows,
        columns,
        pick(2, 3, 4),
        group,
        pick(2, 3, 3, 4, 8),
        pick(16, 32),
        tokens,
        dtype,
        perm,
        pick(0.0, 0.01, 0.2),
    )
    b = (rows, columns, pick(2, 3, 4, 8), group, pick(True, False), pick(F16, BF16), tokens, dtype, perm)
    check(run_emulated, [spqr_case(a, seed), affine_case(b, seed)])
