"""The tensors of official SpQR checkpoints (``quant_method: "spqr"``: 3-bit codes, 16 x 16 tiles), both ways.

Per matrix [N, K], N and K multiples of 16:

* ``dense_weights`` int64 [N * K / 16]: one word per 16 weights of a row, tile rows major, then tile columns, then the
  16 rows of the tile. Bits from the lowest: scale code 3, zero code 3, sixteen weight codes of 3, 8 bits of the second
  level, 2 zero bits. The second level of a tile, (ss, zs, sz, zz) in fp16, is cut into 8 bytes; rows 2i and 2i + 1
  both carry byte i.
* ``row_offsets`` int32 and ``col_vals`` int32 (fp16 bits << 16 | column): outliers, either as CSR (N + 1 offsets) or
  in stripes ("PTCSR", N / 16 + 1 offsets: entry e of a stripe belongs to its row e % 16, rows are filled up with 0).
* ``in_perm`` int32 [K / 2]: pairs of 16-bit column numbers; stored column j is original column perm[j].

The format *adds* an outlier's value to the dense value of its place. The published converter however stores the whole
weight there, above a code that stands for about zero. :func:`raw_outliers` counts how many outliers look like that and
:func:`repair` turns them into what the format means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hf_spqr.formats.panels import ceil_div
from hf_spqr.formats.spqr import SpQRLayout, SpQRWeight

TENSORS = ("dense_weights", "row_offsets", "col_vals", "in_perm")
TILE = 16
BITS = 3
WIDEST = 32768
"""The reference converter damages outliers in columns from this one on (it sign-extends the column)."""

_CODE_SHIFT, _FRAGMENT_SHIFT = 6, 54
_OURS, _THEIRS = (0, 2, 1, 3), (0, 2, 1, 3)  # (ss, zs, sz, zz) <-> (ss, sz, zs, zz): the same swap both ways


def layout(out_features: int, in_features: int) -> SpQRLayout:
    """The layout of our format that holds an official matrix exactly. Raises ValueError where theirs cannot be."""
    if out_features % TILE or in_features % TILE:
        raise ValueError(f"official SpQR needs multiples of {TILE} on both sides, got {out_features} x {in_features}")
    return SpQRLayout(out_features, in_features, bits=BITS, group_size=TILE, stat_bits=BITS, second_group=TILE)


def shapes(out_features: int, in_features: int) -> dict[str, int]:
    """Number of elements of the tensors, apart from the outliers'."""
    return {"dense_weights": out_features * in_features // TILE, "in_perm": in_features // 2}


def decode(out_features: int, in_features: int, tensors: Mapping[str, Tensor]) -> SpQRWeight:
    """Read a matrix; outlier values are those of the file, to be added. ``in_perm`` may be missing or empty.

    Raises ValueError if a tensor has the wrong size or holds indices or values that cannot be.
    """
    lay = layout(out_features, in_features)
    words = tensors["dense_weights"]
    for name, count in shapes(out_features, in_features).items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.numel() not in ((count,) if name == "dense_weights" else (0, count)):
            raise ValueError(f"{name} should have {count} elements, got {tensor.numel()}")
    if words.dtype != torch.int64:
        raise ValueError(f"dense_weights should be int64, got {words.dtype}")
    grid = words.reshape(out_features // TILE, in_features // TILE, TILE)
    fields = [(grid >> (_CODE_SHIFT + BITS * i)) & 7 for i in range(TILE)]
    codes = torch.stack(fields, dim=-1).to(torch.uint8).transpose(1, 2).reshape(out_features, in_features)
    pieces = ((grid >> _FRAGMENT_SHIFT) & 0xFF).to(torch.uint8)[..., ::2].contiguous()
    row, column, value = _read_outliers(lay, tensors["row_offsets"], tensors["col_vals"])
    return SpQRWeight(
        layout=lay,
        codes=codes,
        scale_codes=_rows(grid & 7),
        zero_codes=_rows((grid >> BITS) & 7),
        second=pieces.view(torch.float16)[..., _OURS].contiguous(),
        outlier_row=row,
        outlier_col=column,
        outlier_value=value,
        perm=_read_perm(tensors.get("in_perm"), in_features),
    )


def encode(weight: SpQRWeight, outliers: Literal["csr", "ptcsr"] = "csr") -> dict[str, Tensor]:
    """Write a matrix, its outliers as what is to be added to the dense value.

    Takes every weight whose codes and statistics have at most 3 bits and whose groups are whole multiples of 16.
    Raises ValueError for others, and for matrices that are not multiples of 16 or have more than 32768 columns.
    """
    lay = weight.layout
    whole = lay.group_size < 0 or lay.group_size % TILE == 0
    if lay.bits > BITS or lay.stat_bits > BITS or not whole:
        raise ValueError(
            f"official SpQR holds at most {BITS} bits in groups of {TILE}; this matrix has bits={lay.bits}, "
            f"stat_bits={lay.stat_bits}, group_size={lay.group_size}"
        )
    if lay.in_features > WIDEST:
        raise ValueError(f"official SpQR holds at most {WIDEST} columns, this matrix has {lay.in_features}")
    weight = nearest_codes(_in_small_groups(weight))
    rows, columns = weight.codes.shape
    tiles = (rows // TILE, columns // TILE)
    words = _tiles(weight.scale_codes) | (_tiles(weight.zero_codes) << BITS)
    codes = weight.codes.to(torch.int64).reshape(tiles[0], TILE, tiles[1], TILE).transpose(1, 2)
    for i in range(TILE):
        words |= codes[..., i] << (_CODE_SHIFT + BITS * i)
    pieces = weight.second[..., _THEIRS].contiguous().view(torch.uint8).to(torch.int64)
    words |= pieces.repeat_interleave(2, dim=-1) << _FRAGMENT_SHIFT
    perm = torch.arange(columns) if weight.perm is None else weight.perm.long()
    perm = torch.where(perm >= 1 << 15, perm - (1 << 16), perm).to(torch.int16)
    offsets, values = _write_outliers(weight, striped=outliers == "ptcsr")
    tensors = (words.flatten(), offsets, values, perm.contiguous().view(torch.int32))
    return dict(zip(TENSORS, tensors, strict=True))


def raw_outliers(weight: SpQRWeight) -> tuple[int, int]:
    """(outliers above the code that stands for zero, all outliers).

    About all of them where the whole weights were stored; about one in five by chance.
    """
    row = _outlier_rows(weight)
    column = weight.outlier_col.long()
    zero = _zero(weight)[row, column // TILE]
    expected = zero.round().clamp(0, (1 << BITS) - 1)
    return int((weight.codes[row, column].float() == expected).sum()), row.numel()


def repair(weight: SpQRWeight) -> SpQRWeight:
    """Outliers that hold whole weights, as what must be added to the dense value to give them."""
    row, column = _outlier_rows(weight), weight.outlier_col.long()
    value = weight.outlier_value.float() - weight.dense()[row, column]
    return dataclasses.replace(weight, outlier_value=value.half())


def nearest_codes(weight: SpQRWeight) -> SpQRWeight:
    """The same weights with the nearest code under each outlier: smaller values to add, and never taken for raw."""
    row, column = _outlier_rows(weight), weight.outlier_col.long()
    now = weight.dense()[row, column]
    target = now + weight.outlier_value.float()
    scale, zero = _scale(weight)[row, column // TILE], _zero(weight)[row, column // TILE]
    best = (target / scale + zero).nan_to_num(0.0).round().clamp(0, (1 << BITS) - 1)
    dense = scale * (best - zero)
    better = (target - dense).abs() < 0.99 * weight.outlier_value.float().abs()
    codes = weight.codes.clone()
    codes[row[better], column[better]] = best[better].to(torch.uint8)
    value = torch.where(better, target - dense, weight.outlier_value.float())
    return dataclasses.replace(weight, codes=codes, outlier_value=value.half())


def _rows(field: Tensor) -> Tensor:
    """[tile rows, tile columns, 16] to uint8 [N, K / 16]."""
    return field.to(torch.uint8).transpose(1, 2).flatten(0, 1).contiguous()


def _tiles(codes: Tensor) -> Tensor:
    """Inverse of :func:`_rows`, as int64."""
    return codes.to(torch.int64).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def _outlier_rows(weight: SpQRWeight) -> Tensor:
    return torch.repeat_interleave(weight.outlier_row.diff().long(), output_size=weight.outlier_col.numel())


def _per_row(weight: SpQRWeight) -> Tensor:
    """Second level [N, K / 16, 4] of a weight whose groups are 16 wide."""
    return weight.second.float().repeat_interleave(TILE, 0)[: weight.layout.out_features]


def _scale(weight: SpQRWeight) -> Tensor:
    second = _per_row(weight)
    return second[..., 0] * (weight.scale_codes.float() - second[..., 1])


def _zero(weight: SpQRWeight) -> Tensor:
    second = _per_row(weight)
    return second[..., 2] * (weight.zero_codes.float() - second[..., 3])


def _in_small_groups(weight: SpQRWeight) -> SpQRWeight:
    """The same weight with its statistics repeated for groups of 16 and a second level each."""
    lay = weight.layout
    small = layout(lay.out_features, lay.in_features)
    times = ceil_div(lay.in_features if lay.group_size < 0 else lay.group_size, TILE)
    second = weight.second.repeat_interleave(lay.groups_per_second, 1)[:, : lay.groups]
    return dataclasses.replace(
        weight,
        layout=small,
        scale_codes=weight.scale_codes.repeat_interleave(times, 1)[:, : small.groups],
        zero_codes=weight.zero_codes.repeat_interleave(times, 1)[:, : small.groups],
        second=second.repeat_interleave(times, 1)[:, : small.groups].contiguous(),
    )


def _read_perm(in_perm: Tensor | None, columns: int) -> Tensor | None:
    """int32 [K], None where the columns are in their original order."""
    if in_perm is None or in_perm.numel() == 0:
        return None
    perm = in_perm.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    ordered = torch.arange(columns, dtype=torch.int32, device=perm.device)
    if not torch.equal(perm.sort().values, ordered):
        raise ValueError(f"in_perm does not hold each of 0 .. {columns - 1} once")
    return None if torch.equal(perm, ordered) else perm


def _read_outliers(lay: SpQRLayout, offsets: Tensor, col_vals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CSR with ascending columns: outlier_row int32 [N + 1], outlier_col int32, outlier_value float16."""
    words = col_vals.flatten().to(torch.int32)  # float32 where a layer has none
    counts, total = offsets.diff().long(), words.numel()
    rows = lay.out_features
    if offsets.numel() not in (rows + 1, rows // TILE + 1):
        raise ValueError(f"row_offsets should have {rows + 1} or {rows // TILE + 1} elements, got {offsets.numel()}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != total or bool((counts < 0).any()):
        raise ValueError(f"row_offsets should rise from 0 to the {total} elements of col_vals")
    owner = torch.repeat_interleave(counts, output_size=total)
    if offsets.numel() != rows + 1:
        if bool((offsets % TILE).any()):
            raise ValueError(f"row_offsets of stripes should be multiples of {TILE}")
        owner = TILE * owner + torch.arange(total, device=words.device) % TILE
        owner, words = owner[words != 0], words[words != 0]
    column = (words & 0xFFFF).long()
    value = (words >> 16).to(torch.int16).view(torch.float16)
    if words.numel() and int(column.max()) >= lay.in_features:
        raise ValueError(f"an outlier lies in column {int(column.max())} of {lay.in_features}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"outliers are not finite; the reference converter damages columns from {WIDEST} on")
    place, order = (owner * lay.in_features + column).sort()
    if bool((place[1:] == place[:-1]).any()):
        raise ValueError("two outliers lie in one place")
    starts = torch.bincount(owner, minlength=rows).cumsum(0)
    outlier_row = torch.cat([starts.new_zeros(1), starts]).to(torch.int32)
    return outlier_row, column[order].to(torch.int32), value[order]


def _write_outliers(weight: SpQRWeight, striped: bool) -> tuple[Tensor, Tensor]:
    words = (weight.outlier_value.view(torch.int16).to(torch.int32) << 16) | weight.outlier_col
    if not striped:
        return weight.outlier_row.clone(), words
    row, counts = _outlier_rows(weight), weight.outlier_row.diff().long()
    longest = counts.unflatten(0, (-1, TILE)).amax(1)
    starts = torch.cat([longest.new_zeros(1), (TILE * longest).cumsum(0)])
    place = torch.arange(words.numel()) - weight.outlier_row.long()[row]
    out = words.new_zeros(int(starts[-1]))
    out[starts[row // TILE] + TILE * place + row % TILE] = words
    return starts.to(torch.int32), out
