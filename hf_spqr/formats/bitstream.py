"""Codes as a dense stream of bits in int32 words, lowest bits first: what GPTQ and compressed-tensors store.

32 codes of ``bits`` bits fill exactly ``bits`` words; a code may lie across two words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.formats.panels import ceil_div, pad_to

WORD = 32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 [R, C], each below ``2**bits``, to int32 [R, ceil(C * bits / 32)]; rows start on a word."""
    rows, columns = codes.shape
    grid = pad_to(codes, rows, ceil_div(columns, WORD) * WORD).to(torch.int64).unflatten(1, (-1, WORD))
    words = torch.zeros(*grid.shape[:2], bits + 1, dtype=torch.int64, device=codes.device)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        spread = grid[..., i] << shift
        words[..., word] |= spread & 0xFFFFFFFF
        words[..., word + 1] |= spread >> WORD
    words = words[..., :bits].flatten(1)[:, : ceil_div(columns * bits, WORD)]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_bits(words: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack_bits`: int32 [R, ceil(columns * bits / 32)] to uint8 [R, columns].

    Raises ValueError if the words do not hold that many codes.
    """
    if words.shape[1] != ceil_div(columns * bits, WORD):
        raise ValueError(
            f"{columns} codes of {bits} bits take {ceil_div(columns * bits, WORD)} words, got {words.shape[1]}"
        )
    groups = ceil_div(columns, WORD)
    grid = pad_to(words, words.shape[0], groups * bits).to(torch.int64).unflatten(1, (-1, bits)) & 0xFFFFFFFF
    grid = torch.nn.functional.pad(grid, (0, 1))
    codes = []
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        both = grid[..., word] | (grid[..., word + 1] << WORD)
        codes.append((both >> shift) & ((1 << bits) - 1))
    return torch.stack(codes, dim=-1).to(torch.uint8).flatten(1)[:, :columns].contiguous()
