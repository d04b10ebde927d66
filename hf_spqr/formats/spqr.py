"""SpQR's packed matrix: codes in small groups, two-level statistics, 16-bit outliers (arXiv 2306.03078, section 4.2).

``w[i, j] = s * (q - z)`` with ``s = ss * (qs - sz)`` and ``z = zs * (qz - zz)``, plus the outlier stored for (i, j).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_spqr.formats.columns import permute_back
from hf_spqr.formats.panels import (
    PackedShape,
    Panel,
    as_tile,
    as_vectors,
    ceil_div,
    check_matrix,
    from_tile,
    from_vectors,
    pad_to,
    plan_panels,
    read_tiles,
    write_tiles,
)
from hf_spqr.formats.tiles import COLUMNS, ROWS, leading_vectors

BITS = range(2, 9)
STAT_BITS = range(2, 9)
SECOND_GROUPS = (16, 32)
"""Statistics that share one second level: 16 rows of one column group, or of two neighbouring ones."""
GROUPS_PER_PANEL = 16
WIDE_COLUMNS = 65536
"""From more columns than this on, an outlier is stored as int64 instead of int32."""
TENSORS = ("packed", "outlier_row", "outlier")
"""Names of the tensors that every packed matrix has; ``perm`` is there only when columns were reordered."""


@dataclass(frozen=True)
class SpQRLayout(PackedShape):
    """All that fixes the bytes of a packed [out_features, in_features] matrix, apart from its outliers."""

    out_features: int
    in_features: int
    bits: int = 3
    group_size: int = 16
    stat_bits: int = 3
    second_group: int = 16

    def __post_init__(self) -> None:
        check_matrix(self.out_features, self.in_features, self.bits, self.group_size, BITS)
        if self.stat_bits not in STAT_BITS:
            raise ValueError(f"stat_bits must be {STAT_BITS.start} to {STAT_BITS.stop - 1}, got {self.stat_bits}")
        if self.second_group not in SECOND_GROUPS:
            raise ValueError(f"second_group must be one of {SECOND_GROUPS}, got {self.second_group}")

    @property
    def groups_per_second(self) -> int:
        """Column groups that share one second level."""
        return self.second_group // ROWS

    @property
    def second_groups(self) -> int:
        return ceil_div(self.groups, self.groups_per_second)

    @property
    def outlier_dtype(self) -> torch.dtype:
        return torch.int64 if self.in_features > WIDE_COLUMNS else torch.int32

    @property
    def fixed_bytes(self) -> int:
        return super().fixed_bytes + 4 * (self.out_features + 1)

    def code_vectors(self, groups_here: int) -> int:
        """Vectors of first-level codes in a panel of ``groups_here`` groups: no more than hold a code.

        Wide codes (more than 4 bits) always take their whole tile, so that a kernel may load it whole.
        """
        return leading_vectors(self.stat_bits, groups_here) if self.stat_bits <= 4 else self.stat_bits

    def second_vectors(self, groups_here: int) -> int:
        """Vectors of second-level statistics in a panel of ``groups_here`` groups: 4 fp16 each, 32 fp16 a vector."""
        return ceil_div(4 * ceil_div(groups_here, self.groups_per_second), 2 * ROWS)

    @cached_property
    def panels(self) -> list[Panel]:  # type: ignore[override]
        per_panel = self.tiles if self.group_size < 0 else GROUPS_PER_PANEL * self.group_size // COLUMNS
        return plan_panels(
            self.groups, self.tiles, GROUPS_PER_PANEL, per_panel, self.bits,
            lambda here: self.code_vectors(here) + self.second_vectors(here),
        )  # fmt: skip


@dataclass
class SpQRWeight:
    """A quantized matrix before packing; all columns in stored order (stored column j is original column perm[j]).

    codes uint8 [N, K]; scale_codes, zero_codes uint8 [N, groups]; second float16 [row_blocks, second_groups, 4] =
    (ss, sz, zs, zz); outliers as CSR: outlier_row int32 [N + 1], outlier_col int32 [nnz] ascending within a row,
    outlier_value float16 [nnz], added to the dense value; perm int32 [K] or None.
    """

    layout: SpQRLayout
    codes: Tensor
    scale_codes: Tensor
    zero_codes: Tensor
    second: Tensor
    outlier_row: Tensor
    outlier_col: Tensor
    outlier_value: Tensor
    perm: Tensor | None = None

    def __post_init__(self) -> None:
        lay = self.layout
        stat = (lay.out_features, lay.groups)
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((lay.out_features, lay.in_features), torch.uint8),
            "scale_codes": (stat, torch.uint8),
            "zero_codes": (stat, torch.uint8),
            "second": ((lay.row_blocks, lay.second_groups, 4), torch.float16),
            "outlier_row": ((lay.out_features + 1,), torch.int32),
            "outlier_col": (tuple(self.outlier_value.shape), torch.int32),
            "outlier_value": ((self.outlier_col.numel(),), torch.float16),
        }
        if self.perm is not None:
            expected["perm"] = ((lay.in_features,), torch.int32)
        for name, (shape, dtype) in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")

    def dense(self) -> Tensor:
        """Weights without outliers, float32 [N, K], stored column order."""
        lay = self.layout
        # [N, groups, 4]: every row and group with the second level that it shares with its neighbours.
        second = self.second.float().repeat_interleave(lay.groups_per_second, 1)[:, : lay.groups]
        second = second.repeat_interleave(ROWS, 0)[: lay.out_features]
        scale = second[..., 0] * (self.scale_codes.float() - second[..., 1])
        zero = second[..., 2] * (self.zero_codes.float() - second[..., 3])
        width = lay.in_features if lay.group_size < 0 else lay.group_size
        scale = scale.repeat_interleave(width, 1)[:, : lay.in_features]
        return scale * (self.codes.float() - zero.repeat_interleave(width, 1)[:, : lay.in_features])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights with outliers, [N, K] in the original column order, computed in float32."""
        weight = self.dense()
        rows = torch.repeat_interleave(self.outlier_row.diff().long(), output_size=self.outlier_col.numel())
        weight[rows, self.outlier_col.long()] += self.outlier_value.float()
        return permute_back(weight, self.perm).to(dtype)


def pack(weight: SpQRWeight) -> dict[str, Tensor]:
    """Tensors as stored: packed int32 [row_blocks, words], outlier_row int32 [N + 1], outlier [nnz], perm if any.

    Raises ValueError if a code does not fit its bits.
    """
    lay = weight.layout
    widths = (("codes", lay.bits), ("scale_codes", lay.stat_bits), ("zero_codes", lay.stat_bits))
    for name, bits in widths:
        if int(getattr(weight, name).max()) >> bits:
            raise ValueError(f"{name} hold values that do not fit {bits} bits")
    padded_rows = lay.row_blocks * ROWS
    stats = torch.stack([weight.scale_codes, weight.zero_codes], dim=2)
    stats = pad_to(stats.flatten(1), padded_rows, 2 * lay.groups)
    out = torch.zeros(*lay.packed_shape(), dtype=torch.int32, device=weight.codes.device).unflatten(1, (-1, ROWS))
    for panel in lay.panels:
        second = panel.start + lay.code_vectors(panel.groups)
        first, last = panel.first_group, panel.first_group + panel.groups
        codes = as_tile(stats[:, 2 * first : 2 * last], lay.stat_bits)
        out[:, panel.start : second] = codes[:, : second - panel.start]
        share = slice(first // lay.groups_per_second, ceil_div(last, lay.groups_per_second))
        out[:, second : panel.tiles_start] = as_vectors(weight.second[:, share].flatten(1))
    write_tiles(out, weight.codes, lay.panels, lay.bits)
    tensors = {
        "packed": out.flatten(1),
        "outlier_row": weight.outlier_row,
        "outlier": join_outliers(weight.outlier_col, weight.outlier_value, lay.outlier_dtype),
    }
    if weight.perm is not None:
        tensors["perm"] = weight.perm
    return tensors


def unpack(layout: SpQRLayout, tensors: dict[str, Tensor]) -> SpQRWeight:
    """Inverse of :func:`pack`, exact. Raises ValueError if a tensor has another shape or dtype than the layout's."""
    lay, packed = layout, tensors["packed"]
    if tuple(packed.shape) != lay.packed_shape() or packed.dtype != torch.int32:
        raise ValueError(f"packed must be int32 {list(lay.packed_shape())}, got {packed.dtype} {list(packed.shape)}")
    if tensors["outlier"].dtype != lay.outlier_dtype:
        raise ValueError(f"outlier must be {lay.outlier_dtype}, got {tensors['outlier'].dtype}")
    vectors = packed.unflatten(1, (-1, ROWS))
    stats, seconds = [], []
    for panel in lay.panels:
        second = panel.start + lay.code_vectors(panel.groups)
        codes = vectors.new_zeros(vectors.shape[0], lay.stat_bits, ROWS)
        codes[:, : second - panel.start] = vectors[:, panel.start : second]
        stats.append(from_tile(codes, lay.stat_bits)[:, : 2 * panel.groups])
        share = 4 * ceil_div(panel.groups, lay.groups_per_second)
        seconds.append(from_vectors(vectors[:, second : panel.tiles_start], torch.float16)[:, :share])
    stat = torch.cat(stats, dim=1)[: lay.out_features].unflatten(1, (-1, 2))
    column, value = split_outliers(tensors["outlier"])
    return SpQRWeight(
        layout=lay,
        codes=read_tiles(vectors, lay.panels, lay.bits, lay.out_features, lay.in_features),
        scale_codes=stat[..., 0].contiguous(),
        zero_codes=stat[..., 1].contiguous(),
        second=torch.cat(seconds, dim=1).unflatten(1, (-1, 4)),
        outlier_row=tensors["outlier_row"],
        outlier_col=column,
        outlier_value=value,
        perm=tensors.get("perm"),
    )


def join_outliers(column: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """int32: fp16 bits << 16 | column; int64: fp16 bits << 32 | column."""
    bits = value.view(torch.int16).to(dtype)
    return (bits << (16 if dtype == torch.int32 else 32)) | column.to(dtype)


def split_outliers(outlier: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`join_outliers`: column int32 [nnz], value float16 [nnz]."""
    shift = 16 if outlier.dtype == torch.int32 else 32
    column = (outlier & ((1 << shift) - 1)).to(torch.int32)
    return column, (outlier >> shift).to(torch.int16).view(torch.float16)


def check_statistics(layout: SpQRLayout, packed: Tensor) -> None:
    """Raise ValueError unless all second-level statistics are finite; ``packed`` [..., words]."""
    vectors = packed.unflatten(-1, (-1, ROWS))
    for panel in layout.panels:
        second = vectors[..., panel.start + layout.code_vectors(panel.groups) : panel.tiles_start, :]
        if not bool(second.contiguous().view(torch.float16).isfinite().all()):
            raise ValueError("a second-level scale or zero point is infinite or NaN")


def check_outliers(layout: SpQRLayout, outlier_row: Tensor, outlier: Tensor) -> None:
    """Raise ValueError unless the outliers are finite and a well-formed CSR matrix of the layout's shape.

    Kernels trust the latter.
    """
    if outlier_row.shape != (layout.out_features + 1,) or outlier_row.dtype != torch.int32:
        wanted, found = f"torch.int32 [{layout.out_features + 1}]", f"{outlier_row.dtype} {list(outlier_row.shape)}"
        raise ValueError(f"outlier_row must be {wanted}, got {found}")
    if int(outlier_row[0]) != 0 or int(outlier_row[-1]) != outlier.numel() or bool((outlier_row.diff() < 0).any()):
        raise ValueError(f"outlier_row must rise from 0 to the number of outliers, {outlier.numel()}")
    if outlier.dtype != layout.outlier_dtype:
        raise ValueError(f"outlier must be {layout.outlier_dtype}, got {outlier.dtype}")
    if outlier.numel() == 0:
        return
    column, value = split_outliers(outlier)
    if not bool(value.isfinite().all()):
        raise ValueError("an outlier is infinite or NaN")
    if int(column.max()) >= layout.in_features:
        raise ValueError(f"an outlier lies beyond the last column, {layout.in_features - 1}")
    row = torch.repeat_interleave(outlier_row.diff().long(), output_size=outlier.numel())
    if bool(((row[1:] == row[:-1]) & (column[1:] <= column[:-1])).any()):
        raise ValueError("the columns of the outliers must rise within each row")
