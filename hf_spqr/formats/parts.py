"""Parts of a packed matrix, and matrices joined to one: for tensor parallelism and fused layers. No number changes.

A matrix is its layout with its tensors as :func:`pack` gives them, in the SpQR or the affine format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout, AffineWeight
from hf_spqr.formats.panels import ceil_div
from hf_spqr.formats.spqr import SpQRLayout, SpQRWeight
from hf_spqr.formats.tiles import COLUMNS, ROWS

__all__ = ["Matrix", "join_columns", "join_rows", "joinable", "shared_columns", "take_columns", "take_rows"]

Layout = SpQRLayout | AffineLayout
Matrix = tuple[Any, dict[str, Tensor]]
"""A layout and the tensors of a matrix in it."""


def take_rows(layout: Layout, tensors: Mapping[str, Tensor], start: int, stop: int) -> Matrix:
    """Rows ``start`` to ``stop`` (not included); ``packed`` and outliers are views.

    Raises:
        ValueError: the cut goes through a block of 16 rows, which share statistics.
    """
    rows = layout.out_features
    if not 0 <= start < stop <= rows or start % ROWS or (stop % ROWS and stop != rows):
        raise ValueError(f"rows {start} to {stop} of {rows} cannot be cut out: use multiples of {ROWS}")
    part = dict(tensors)
    part["packed"] = tensors["packed"][start // ROWS : ceil_div(stop, ROWS)]
    if "outlier_row" in tensors:
        counts = tensors["outlier_row"][start : stop + 1]
        part["outlier"] = tensors["outlier"][int(counts[0]) : int(counts[-1])]
        part["outlier_row"] = counts - counts[0]
    return replace(layout, out_features=stop - start), part


def take_columns(layout: Layout, tensors: Mapping[str, Tensor], start: int, stop: int) -> Matrix:
    """Columns ``start`` to ``stop`` (not included). Whole panels are copied, others are packed anew.

    Raises:
        ValueError: the cut goes through columns that share statistics, or the columns are in an order of their own.
    """
    columns = layout.in_features
    shared = shared_columns(layout)
    if not 0 <= start < stop <= columns or start % shared or (stop % shared and stop != columns):
        raise ValueError(f"columns {start} to {stop} of {columns} cannot be cut out: use multiples of {shared}")
    if tensors.get("perm") is not None:
        raise ValueError("its columns are in an order of their own (act_order), none can be cut out")
    part_layout = replace(layout, in_features=stop - start)
    words = _panel_words(layout, start, stop)
    if words is None:
        return part_layout, _repack_columns(layout, part_layout, tensors, start)
    part = {**tensors, "packed": tensors["packed"][:, words].contiguous()}
    if isinstance(layout, SpQRLayout):
        column, value = spqr.split_outliers(tensors["outlier"])
        counts, column, value = _outliers_within(tensors["outlier_row"], column, value, start, stop)
        outlier = spqr.join_outliers(column, value, part_layout.outlier_dtype)  # type: ignore[union-attr]
        part |= {"outlier_row": counts, "outlier": outlier}
    return part_layout, part


def joinable(above: Matrix, below: Matrix) -> bool:
    """Whether :func:`join_rows` takes the two: same layout of columns, whole blocks of 16 rows, same column order."""
    (layout, tensors), (other, others) = above, below
    perm, other_perm = tensors.get("perm"), others.get("perm")
    if (perm is None) != (other_perm is None) or layout.out_features % ROWS:
        return False
    same_order = perm is None or other_perm is None or torch.equal(perm, other_perm)
    return same_order and replace(layout, out_features=1) == replace(other, out_features=1)


def join_rows(matrices: Sequence[Matrix]) -> Matrix:
    """The matrices below each other as one.

    Raises:
        ValueError: neighbours are not :func:`joinable`.
    """
    if not all(joinable(*pair) for pair in pairwise(matrices)):
        raise ValueError("matrices of different layouts, column orders or parts of 16 rows cannot be joined")
    layout, tensors = matrices[0]
    joined = {**tensors, "packed": torch.cat([part["packed"] for _, part in matrices])}
    if "outlier_row" in tensors:
        joined["outlier"] = torch.cat([part["outlier"] for _, part in matrices])
        counts = [part["outlier_row"].diff() for _, part in matrices]
        joined["outlier_row"] = _from_counts(torch.cat(counts))
    return replace(layout, out_features=sum(part.out_features for part, _ in matrices)), joined


def join_columns(matrices: Sequence[Matrix]) -> Matrix:
    """The matrices side by side as one, packed anew: the inverse of cutting a matrix by :func:`take_columns`.

    Raises:
        ValueError: they differ in more than their columns, one that is not the last ends inside columns that share
            statistics, or their columns are in orders of their own.
    """
    layout = matrices[0][0]
    shared = shared_columns(layout)
    alike = all(replace(part, in_features=1) == replace(layout, in_features=1) for part, _ in matrices)
    ends = any(part.in_features % shared for part, _ in matrices[:-1])
    if not alike or ends or any(tensors.get("perm") is not None for _, tensors in matrices):
        raise ValueError("matrices of different layouts, orders or parts of shared statistics cannot be joined")
    whole = replace(layout, in_features=sum(part.in_features for part, _ in matrices))
    if not isinstance(layout, SpQRLayout):
        affines = [affine.unpack(part, dict(tensors)) for part, tensors in matrices]
        codes = torch.cat([part.codes for part in affines], dim=1)
        if layout.per_channel:
            return whole, affine.pack(AffineWeight(whole, codes, affines[0].scales, affines[0].zeros))
        scales = torch.cat([part.scales for part in affines], dim=1)
        zeros = [part.zeros for part in affines if part.zeros is not None]
        return whole, affine.pack(AffineWeight(whole, codes, scales, torch.cat(zeros, dim=1) if zeros else None))
    parts = [spqr.unpack(part, dict(tensors)) for part, tensors in matrices]
    rows = [torch.arange(layout.out_features).repeat_interleave(part.outlier_row.diff().long()) for part in parts]
    starts = torch.tensor([0, *(part.layout.in_features for part in parts)]).cumsum(0).tolist()
    order = torch.cat(rows).argsort(stable=True)  # what a row has in one part stays before what it has in the next
    columns = torch.cat([part.outlier_col + start for part, start in zip(parts, starts, strict=False)])

    def side_by_side(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        return tensors[0] if layout.per_channel and name != "codes" else torch.cat(tensors, dim=1)

    return whole, spqr.pack(
        SpQRWeight(
            layout=whole,
            codes=side_by_side("codes"),
            scale_codes=side_by_side("scale_codes"),
            zero_codes=side_by_side("zero_codes"),
            second=side_by_side("second"),
            outlier_row=_from_counts(torch.bincount(torch.cat(rows), minlength=layout.out_features)),
            outlier_col=columns[order],
            outlier_value=torch.cat([part.outlier_value for part in parts])[order],
        )
    )


def shared_columns(layout: Layout) -> int:
    """How many neighbouring columns share statistics."""
    if layout.per_channel:
        return 1
    return layout.group_size * (layout.groups_per_second if isinstance(layout, SpQRLayout) else 1)


def _panel_words(layout: Layout, start: int, stop: int) -> slice | None:
    """The words of a row block that columns ``start`` to ``stop`` take, if these are whole panels."""
    if layout.per_channel:
        return slice(0, layout.words) if (start, stop) == (0, layout.in_features) else None
    first = {COLUMNS * panel.first_tile: ROWS * panel.start for panel in layout.panels}
    first[layout.in_features] = layout.words
    return slice(first[start], first[stop]) if start in first and stop in first else None


def _repack_columns(layout: Layout, part: Layout, tensors: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
    stop = start + part.in_features
    columns = slice(start, stop)
    width = layout.in_features if layout.per_channel else layout.group_size
    groups = slice(start // width, ceil_div(stop, width))
    if isinstance(layout, SpQRLayout):
        assert isinstance(part, SpQRLayout)
        whole = spqr.unpack(layout, dict(tensors))
        outliers = whole.outlier_row, whole.outlier_col, whole.outlier_value
        counts, column, value = _outliers_within(*outliers, start, stop)
        second = slice(groups.start // layout.groups_per_second, ceil_div(groups.stop, layout.groups_per_second))
        return spqr.pack(
            SpQRWeight(
                layout=part,
                codes=whole.codes[:, columns],
                scale_codes=whole.scale_codes[:, groups],
                zero_codes=whole.zero_codes[:, groups],
                second=whole.second[:, second],
                outlier_row=counts,
                outlier_col=column,
                outlier_value=value,
            )
        )
    assert isinstance(part, AffineLayout)
    matrix = affine.unpack(layout, dict(tensors))
    zeros = None if matrix.zeros is None else matrix.zeros[:, groups]
    return affine.pack(AffineWeight(part, matrix.codes[:, columns], matrix.scales[:, groups], zeros))


def _outliers_within(
    outlier_row: Tensor, column: Tensor, value: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """outlier_row, columns (counted from ``start``) and values of the outliers in columns ``start`` to ``stop``."""
    inside = (column >= start) & (column < stop)
    row = torch.repeat_interleave(outlier_row.diff().long(), output_size=column.numel())
    counts = torch.bincount(row[inside], minlength=outlier_row.numel() - 1)
    return _from_counts(counts), column[inside] - start, value[inside]


def _from_counts(counts: Tensor) -> Tensor:
    """outlier_row int32 [N + 1] from the numbers of outliers in each row [N]."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
