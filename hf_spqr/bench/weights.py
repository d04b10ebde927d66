"""Packed linear layers of random weights: any shape in a moment, without a quantization run."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout, AffineWeight
from hf_spqr.formats.spqr import SpQRLayout, SpQRWeight
from hf_spqr.nn import AffineLinear, SpQRLinear

__all__ = ["affine_linear", "spqr_linear"]

SAMPLE_ROWS = 512
"""Rows that are packed; the others repeat them. No kernel is slower or faster for it, and packing a whole model would
take minutes."""
CHUNK = 1 << 24
"""Weights for which outliers are drawn at a time."""
OUTLIER_BITS = 0x2000
"""2^-7 in float16."""


def spqr_linear(
    rows: int, columns: int, *, bits: int = 3, group_size: int = 16, outliers: float = 0.01, device: str = "cpu"
) -> SpQRLinear:
    """A bfloat16 layer in SpQR's format whose output is about as large as its input.

    outliers: the chance of each weight to have one, so that rows differ in their number.
    """
    layout = SpQRLayout(rows, columns, bits, group_size)
    column, per_row = _outlier_columns(rows, columns, outliers, device)
    row = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    row[1:] = per_row.cumsum(0)
    tensors = {
        "packed": _repeat_rows(_sample_spqr(min(rows, SAMPLE_ROWS), columns, bits, group_size, device), layout),
        "outlier_row": row,
        "outlier": (column | (OUTLIER_BITS << 16)).to(layout.outlier_dtype),
    }
    return SpQRLinear(layout, tensors, dtype=torch.bfloat16)


def affine_linear(
    rows: int, columns: int, *, bits: int = 4, group_size: int = 128, device: str = "cpu"
) -> AffineLinear:
    """A bfloat16 layer in the affine format whose output is about as large as its input."""
    layout = AffineLayout(rows, columns, bits, group_size)
    packed = _repeat_rows(_sample_affine(min(rows, SAMPLE_ROWS), columns, bits, group_size, device), layout)
    return AffineLinear(layout, {"packed": packed}, dtype=torch.bfloat16)


def _outlier_columns(rows: int, columns: int, share: float, device: str) -> tuple[Tensor, Tensor]:
    """Columns of all outliers, row after row, and how many each row has."""
    found, counts = [], []
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        drawn = torch.rand(min(step, rows - first), columns, device=device) < share
        found.append(drawn.nonzero()[:, 1])
        counts.append(drawn.sum(1))
    return torch.cat(found), torch.cat(counts)


def _codes(shape: tuple[int, int], bits: int, device: str) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, device=device)


def _around(shape: tuple[int, ...], mean: float, device: str) -> Tensor:
    """Numbers between half and one and a half times ``mean``, float16."""
    return ((torch.rand(shape, device=device) + 0.5) * mean).half()


@lru_cache(maxsize=16)
def _sample_spqr(rows: int, columns: int, bits: int, group_size: int, device: str) -> Tensor:
    layout = SpQRLayout(rows, columns, bits, group_size)
    groups, tables = (rows, layout.groups), (layout.row_blocks, layout.second_groups)
    means = (0.4 * columns**-0.5 / 2**bits, -2, 2**bits / 8, 0)
    weight = SpQRWeight(
        layout,
        _codes((rows, columns), bits, device),
        _codes(groups, layout.stat_bits, device),
        _codes(groups, layout.stat_bits, device),
        torch.stack([_around(tables, mean, device) for mean in means], dim=-1),
        torch.zeros(rows + 1, dtype=torch.int32, device=device),
        torch.zeros(0, dtype=torch.int32, device=device),
        torch.zeros(0, dtype=torch.float16, device=device),
    )
    return spqr.pack(weight)["packed"]


@lru_cache(maxsize=16)
def _sample_affine(rows: int, columns: int, bits: int, group_size: int, device: str) -> Tensor:
    layout = AffineLayout(rows, columns, bits, group_size)
    groups = (rows, layout.groups)
    weight = AffineWeight(
        layout,
        _codes((rows, columns), bits, device),
        _around(groups, 3.2 * columns**-0.5 / 2**bits, device),
        _codes(groups, bits, device),
    )
    return affine.pack(weight)["packed"]


def _repeat_rows(sample: Tensor, layout: SpQRLayout | AffineLayout) -> Tensor:
    """[row_blocks, words]: memory of its own, so that a cache holds no more of it than of any matrix."""
    return sample.repeat(-(-layout.row_blocks // sample.shape[0]), 1)[: layout.row_blocks].contiguous()
