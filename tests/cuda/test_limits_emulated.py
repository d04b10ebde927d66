"""More rows, columns and tokens than one grid or the shared memory has room for, on the host.

A grid has at most 65,535 blocks in its second dimension, 64 in emulation.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout
from tests.cuda.emulator import Case, Finish, Int8Linear, Refused
from tests.weights import random_affine, random_spqr

BLOCKS = 64
F32, F16 = torch.float32, torch.float16


def test_finish_of_more_rows_than_a_grid_has_blocks(run_emulated: Callable) -> None:
    rows = BLOCKS * 256 + 3
    product = torch.arange(rows)[None].half()
    (y,) = run_emulated([Finish(product, None, None, torch.zeros(1, rows, dtype=F16))])
    assert torch.equal(y, product)


def test_dequantize_of_more_columns_than_a_grid_has_blocks(run_emulated: Callable) -> None:
    columns = BLOCKS * 512 + 700
    weights = [
        random_spqr(SpQRLayout(2, columns), 0.01),
        random_affine(AffineLayout(3, columns, 2, -1), True),
        random_affine(AffineLayout(2, 2 * columns, 4, 64)),
    ]
    cases = [Case(weight, dtype=F16) for weight in weights]
    for case, y in zip(cases, run_emulated(cases), strict=True):
        assert torch.equal(y, case.weight.dequantize(F16))


@pytest.mark.parametrize(("bits", "group", "columns"), [(4, -1, 40), (5, 16, 33), (8, 32, 64)])
def test_integers_of_more_tokens_than_a_grid_has_blocks(
    run_emulated: Callable, bits: int, group: int, columns: int
) -> None:
    tokens = BLOCKS * 16 + 9
    gen = torch.Generator().manual_seed(bits)
    code = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8, generator=gen)
    scale, zero = torch.rand(tokens, 1, generator=gen), torch.randint(-9, 9, (tokens, 1), generator=gen).int()
    weight = random_affine(AffineLayout(5, columns, bits, group), seed=bits)
    for dtype in (F32, F16):
        case = Int8Linear(weight, code, scale, zero, None, dtype)
        (y,) = run_emulated([case])
        assert torch.equal(y, case.expected())


def test_x_that_is_far_too_large_for_shared_memory(run_emulated: Callable) -> None:
    """Its bytes, 2.3 billion for 16 tokens of the widest matrix, are more than an int holds."""
    cases = [Refused(1, columns, 16, 132) for columns in (2**20, 2**26 - 1)]
    assert all(int(refused) for refused in run_emulated(cases))
