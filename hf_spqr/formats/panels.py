"""Panels: what the columns of a row block that share one stretch of statistics look like as a stream of vectors.

A row block (16 rows) is its panels one after another, in column order. A panel is its statistics followed by its
weight tiles. All positions are counted in vectors of 16 int32 words from the start of the row block.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_spqr.formats.tiles import COLUMNS, ROWS, pack_tiles, unpack_tiles

GROUP_SIZES = (-1, 8, 16, 32, 64, 128)
"""Columns that share a scale; -1 means one group for the whole row."""


class Panel(NamedTuple):
    start: int
    """First vector of the panel; its statistics begin here."""
    tiles_start: int
    """First vector of its weight tiles."""
    first_group: int
    groups: int
    first_tile: int
    tiles: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def check_matrix(out_features: int, in_features: int, bits: int, group_size: int, widths: range) -> None:
    """Raise ValueError unless the format can hold such a matrix."""
    if out_features < 1 or in_features < 1:
        raise ValueError(f"a packed matrix needs at least one row and one column, got {out_features} x {in_features}")
    if bits not in widths:
        raise ValueError(f"bits must be {widths.start} to {widths.stop - 1}, got {bits}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES} (-1: one group per row), got {group_size}")


class PackedShape:
    """What follows from the shape and the panels of a packed matrix, the same for every format."""

    out_features: int
    in_features: int
    bits: int
    group_size: int
    panels: list[Panel]

    @property
    def row_blocks(self) -> int:
        return ceil_div(self.out_features, ROWS)

    @property
    def tiles(self) -> int:
        """Weight tiles in a row block."""
        return ceil_div(self.in_features, COLUMNS)

    @property
    def per_channel(self) -> bool:
        return self.group_size < 0

    @property
    def groups(self) -> int:
        return 1 if self.per_channel else ceil_div(self.in_features, self.group_size)

    @property
    def words(self) -> int:
        """int32 words of a row block."""
        last = self.panels[-1]
        return ROWS * (last.tiles_start + self.bits * last.tiles)

    def packed_shape(self) -> tuple[int, int]:
        return self.row_blocks, self.words

    @property
    def fixed_bytes(self) -> int:
        """Bytes of a matrix without outliers and column order: none of this layout takes less."""
        return 4 * self.row_blocks * self.words


def plan_panels(
    groups: int, tiles: int, groups_per_panel: int, tiles_per_panel: int, bits: int, stat_vectors: Callable[[int], int]
) -> list[Panel]:
    """Cut a row block into panels. ``stat_vectors(groups_here)`` is the size of a panel's statistics in vectors."""
    panels = []
    start = 0
    for index in range(ceil_div(groups, groups_per_panel)):
        first_group, first_tile = index * groups_per_panel, index * tiles_per_panel
        here = min(groups_per_panel, groups - first_group)
        tiles_here = min(tiles_per_panel, tiles - first_tile)
        tiles_start = start + stat_vectors(here)
        panels.append(Panel(start, tiles_start, first_group, here, first_tile, tiles_here))
        start = tiles_start + bits * tiles_here
    return panels


def pad_to(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Zero-pad a matrix at its bottom and right to ``rows`` x ``columns``."""
    missing = (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    return torch.nn.functional.pad(matrix, missing) if any(missing) else matrix


def as_tile(matrix: Tensor, bits: int) -> Tensor:
    """Pack at most 32 columns of statistics codes [16 * R, <= 32] into one tile of vectors [R, bits, 16]."""
    return pack_tiles(pad_to(matrix, matrix.shape[0], COLUMNS), bits)[:, 0]


def from_tile(vectors: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`as_tile`: [R, bits, 16] to uint8 [16 * R, 32]."""
    return unpack_tiles(vectors[:, None], bits)


def as_vectors(halves: Tensor) -> Tensor:
    """16-bit values [R, n], n at most a multiple of 32 after zero padding, as vectors [R, ceil(n / 32), 16]."""
    halves = pad_to(halves, halves.shape[0], ceil_div(halves.shape[1], 2 * ROWS) * 2 * ROWS).contiguous()
    return halves.view(torch.int32).reshape(halves.shape[0], -1, ROWS)


def from_vectors(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`as_vectors`: [R, v, 16] int32 to [R, 32 * v] of a 16-bit ``dtype``."""
    return vectors.contiguous().view(dtype).reshape(vectors.shape[0], -1)


def write_tiles(out: Tensor, codes: Tensor, panels: list[Panel], bits: int) -> None:
    """Write the weight tiles of ``codes`` [N, K] into ``out`` int32 [R, vectors, 16], a stretch of rows at a time."""
    columns = COLUMNS * sum(panel.tiles for panel in panels)
    for first, last in _row_stretches(out.shape[0], columns):
        rows = pad_to(codes[first * ROWS : last * ROWS], (last - first) * ROWS, columns)
        tiles = pack_tiles(rows, bits).flatten(1, 2)
        for panel in panels:
            source = tiles[:, bits * panel.first_tile : bits * (panel.first_tile + panel.tiles)]
            out[first:last, panel.tiles_start : panel.tiles_start + bits * panel.tiles] = source


def read_tiles(vectors: Tensor, panels: list[Panel], bits: int, out_features: int, in_features: int) -> Tensor:
    """Inverse of :func:`write_tiles`: codes uint8 [out_features, in_features]."""
    codes = torch.empty(out_features, in_features, dtype=torch.uint8, device=vectors.device)
    for first, last in _row_stretches(vectors.shape[0], in_features):
        parts = [vectors[first:last, p.tiles_start : p.tiles_start + bits * p.tiles] for p in panels]
        tiles = torch.cat(parts, dim=1).unflatten(1, (-1, bits))
        target = codes[first * ROWS : last * ROWS]
        target.copy_(unpack_tiles(tiles, bits)[: target.shape[0], :in_features])
    return codes


def _row_stretches(row_blocks: int, columns: int) -> Iterator[tuple[int, int]]:
    """Bound the scratch memory of packing: about 2**22 weights at a time."""
    step = max(1, 2**22 // (ROWS * columns))
    for first in range(0, row_blocks, step):
        yield first, min(row_blocks, first + step)
