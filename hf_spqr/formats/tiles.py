"""The tile: 16 rows x 32 columns of ``bits``-bit codes in ``bits`` vectors of 16 int32 words, one word per row.

In a word the low 16 bits belong to the even columns of the tile, the high 16 bits to the odd ones, both laid out
alike. So a field is a place in a half-word together with the column pair ``(2 * pair, 2 * pair + 1)`` it serves.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 16
"""Rows of a tile, and words of a vector."""
COLUMNS = 32
"""Columns of a tile."""
BITS = (1, 2, 3, 4, 5, 6, 7, 8)

_PLANES = {5: (4, 1), 6: (4, 2), 7: (4, 3)}
# Three bits: five codes and one spare bit in each half-word. The order keeps every two neighbouring column pairs of a
# group of 16 columns either in one vector, or in the fifth places, which a kernel brings together in one step.
_THREE_BIT_PAIRS = ((0, 1, 2, 3, 6), (4, 5, 8, 9, 7), (10, 11, 12, 13, 14))
_THREE_BIT_SPARE_PAIR = 15


class Field(NamedTuple):
    """``width`` bits of a code, from its bit ``low`` on, at bit ``shift`` of a half-word of ``vector``."""

    vector: int
    shift: int
    pair: int
    low: int
    width: int


@cache
def tile_fields(bits: int) -> tuple[Field, ...]:
    """Where the codes of a tile lie. Raises ValueError for a width outside 1..8."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    if bits in _PLANES:
        fields: list[Field] = []
        vector = low = 0
        for width in _PLANES[bits]:
            fields += [f._replace(vector=f.vector + vector, low=f.low + low) for f in tile_fields(width)]
            vector, low = vector + width, low + width
        return tuple(fields)
    if bits == 3:
        whole = (
            Field(v, 3 * i, pair, 0, 3) for v, pairs in enumerate(_THREE_BIT_PAIRS) for i, pair in enumerate(pairs)
        )
        return (*whole, *(Field(v, 15, _THREE_BIT_SPARE_PAIR, v, 1) for v in range(3)))
    per_half = 16 // bits
    return tuple(Field(pair // per_half, bits * (pair % per_half), pair, 0, bits) for pair in range(16))


def leading_vectors(bits: int, pairs: int) -> int:
    """Vectors from the first on that hold all codes of the first ``pairs`` column pairs."""
    return 1 + max(field.vector for field in tile_fields(bits) if field.pair < pairs)


def pack_tiles(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes`` uint8 [16 * R, 32 * T], each below ``2**bits``, into int32 [R, T, bits, 16] vectors."""
    if codes.shape[0] % ROWS or codes.shape[1] % COLUMNS:
        raise ValueError(f"tiles need multiples of {ROWS} x {COLUMNS} codes, got {tuple(codes.shape)}")
    grid = codes.reshape(-1, ROWS, codes.shape[1] // COLUMNS, COLUMNS // 2, 2).permute(0, 2, 1, 3, 4)
    words = torch.zeros(*grid.shape[:2], bits, ROWS, dtype=torch.int32, device=codes.device)
    for vector, shift, pair, low, width in tile_fields(bits):
        two = (grid[..., pair, :].to(torch.int32) >> low) & ((1 << width) - 1)
        words[:, :, vector] |= (two[..., 0] << shift) | (two[..., 1] << (16 + shift))
    return words


def unpack_tiles(words: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`pack_tiles`: int32 [R, T, bits, 16] to uint8 [16 * R, 32 * T]."""
    blocks, tiles = words.shape[:2]
    grid = torch.zeros(blocks, tiles, ROWS, COLUMNS // 2, 2, dtype=torch.uint8, device=words.device)
    for vector, shift, pair, low, width in tile_fields(bits):
        mask = (1 << width) - 1
        for parity in (0, 1):
            part = (words[:, :, vector] >> (16 * parity + shift)) & mask
            grid[..., pair, parity] |= (part << low).to(torch.uint8)
    return grid.permute(0, 2, 1, 3, 4).reshape(blocks * ROWS, tiles * COLUMNS)
