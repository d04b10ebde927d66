"""The affine packed matrix of OmniQuant, GPTQ and round-to-nearest: ``w = scale * (q - zero)`` per group or row."""

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
from hf_spqr.formats.tiles import COLUMNS, ROWS

BITS = range(1, 9)
GROUPS_PER_PANEL = 32
SCALE_DTYPES = (torch.float16, torch.bfloat16)
TENSORS = ("packed",)
"""Names of the tensors that every packed matrix has; ``perm`` is there only when columns were reordered."""


@dataclass(frozen=True)
class AffineLayout(PackedShape):
    """All that fixes the bytes of a packed [out_features, in_features] matrix."""

    out_features: int
    in_features: int
    bits: int
    group_size: int = -1
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        check_matrix(self.out_features, self.in_features, self.bits, self.group_size, BITS)
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be one of {SCALE_DTYPES}, got {self.scale_dtype}")

    @property
    def middle(self) -> int:
        """The zero point of a symmetric matrix."""
        return 1 << (self.bits - 1)

    def scale_vectors(self, groups_here: int) -> int:
        """Vectors of scales in a panel of ``groups_here`` groups: two groups of 16 rows each."""
        return ceil_div(groups_here, 2)

    @cached_property
    def panels(self) -> list[Panel]:  # type: ignore[override]
        if self.per_channel:
            return plan_panels(1, self.tiles, 1, self.tiles, self.bits, lambda here: 1)
        zeros = 0 if self.symmetric else self.bits
        return plan_panels(
            self.groups, self.tiles, GROUPS_PER_PANEL, GROUPS_PER_PANEL * self.group_size // COLUMNS, self.bits,
            lambda here: self.scale_vectors(here) + zeros,
        )  # fmt: skip


@dataclass
class AffineWeight:
    """A quantized matrix before packing; columns in stored order (stored column j is original column perm[j]).

    codes uint8 [N, K]; scales [N, groups] of the layout's scale dtype; zeros uint8 [N, groups], None when symmetric
    (then every zero point is ``2**(bits - 1)``); perm int32 [K] or None.
    """

    layout: AffineLayout
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None = None

    def __post_init__(self) -> None:
        lay = self.layout
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((lay.out_features, lay.in_features), torch.uint8),
            "scales": ((lay.out_features, lay.groups), lay.scale_dtype),
        }
        if (self.zeros is None) != lay.symmetric:
            raise ValueError("zeros must be None for a symmetric layout and a tensor for an asymmetric one")
        if self.zeros is not None:
            expected["zeros"] = ((lay.out_features, lay.groups), torch.uint8)
        if self.perm is not None:
            expected["perm"] = ((lay.in_features,), torch.int32)
        for name, (shape, dtype) in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights [N, K] in the original column order, computed in float32."""
        lay = self.layout
        width = lay.in_features if lay.per_channel else lay.group_size
        scale = self.scales.float().repeat_interleave(width, 1)[:, : lay.in_features]
        weight = self.codes.float()
        if self.zeros is None:
            weight -= lay.middle
        else:
            weight -= self.zeros.float().repeat_interleave(width, 1)[:, : lay.in_features]
        return permute_back(weight.mul_(scale), self.perm).to(dtype)


def pack(weight: AffineWeight) -> dict[str, Tensor]:
    """Tensors as stored: packed int32 [row_blocks, words], perm if any. Raises ValueError if a code does not fit."""
    lay = weight.layout
    for name in ("codes", "zeros"):
        tensor = getattr(weight, name)
        if tensor is not None and int(tensor.max()) >> lay.bits:
            raise ValueError(f"{name} hold values that do not fit {lay.bits} bits")
    padded_rows = lay.row_blocks * ROWS
    scales = pad_to(weight.scales, padded_rows, lay.groups)
    zeros = None if weight.zeros is None else pad_to(weight.zeros, padded_rows, lay.groups)
    out = torch.zeros(*lay.packed_shape(), dtype=torch.int32, device=weight.codes.device).unflatten(1, (-1, ROWS))
    if lay.per_channel:
        high = torch.zeros_like(scales).view(torch.int16) if zeros is None else zeros.to(torch.int16)
        out[:, 0] = torch.stack([scales.view(torch.int16), high], dim=2).view(torch.int32).reshape(-1, ROWS)
    else:
        for panel in lay.panels:
            here = slice(panel.first_group, panel.first_group + panel.groups)
            middle = panel.start + lay.scale_vectors(panel.groups)
            out[:, panel.start : middle] = _scale_vectors(scales[:, here])
            if zeros is not None:
                out[:, middle : panel.tiles_start] = as_tile(zeros[:, here], lay.bits)
    write_tiles(out, weight.codes, lay.panels, lay.bits)
    tensors = {"packed": out.flatten(1)}
    if weight.perm is not None:
        tensors["perm"] = weight.perm
    return tensors


def unpack(layout: AffineLayout, tensors: dict[str, Tensor]) -> AffineWeight:
    """Inverse of :func:`pack`, exact. Raises ValueError if the tensor has another shape or dtype than the layout's."""
    lay, packed = layout, tensors["packed"]
    if tuple(packed.shape) != lay.packed_shape() or packed.dtype != torch.int32:
        raise ValueError(f"packed must be int32 {list(lay.packed_shape())}, got {packed.dtype} {list(packed.shape)}")
    vectors = packed.unflatten(1, (-1, ROWS))
    scales, zeros = [], []
    if lay.per_channel:
        halves = vectors[:, 0].contiguous().view(torch.int16).reshape(-1, 2)
        scales.append(halves[:, :1].contiguous().view(lay.scale_dtype))
        zeros.append(halves[:, 1:].to(torch.uint8))
    else:
        for panel in lay.panels:
            middle = panel.start + lay.scale_vectors(panel.groups)
            pairs = from_vectors(vectors[:, panel.start : middle], lay.scale_dtype).unflatten(1, (-1, ROWS, 2))
            scales.append(pairs.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:, : panel.groups])
            if not lay.symmetric:
                zeros.append(from_tile(vectors[:, middle : panel.tiles_start], lay.bits)[:, : panel.groups])
    n = lay.out_features
    return AffineWeight(
        layout=lay,
        codes=read_tiles(vectors, lay.panels, lay.bits, n, lay.in_features),
        scales=torch.cat(scales, dim=1)[:n].contiguous(),
        zeros=None if lay.symmetric else torch.cat(zeros, dim=1)[:n].contiguous(),
        perm=tensors.get("perm"),
    )


def check_statistics(layout: AffineLayout, packed: Tensor) -> None:
    """Raise ValueError unless scales are finite and zero points fit the bits of a code; ``packed`` [..., words].

    Kernels trust the zero points. Only those of whole rows have more room than that.
    """
    if layout.per_channel:
        rows = packed[..., :ROWS]
        if not layout.symmetric and bool((rows >> 16 + layout.bits).any()):
            raise ValueError(f"a zero point does not fit {layout.bits} bits")
        scales = [rows.to(torch.int16)]
    else:
        vectors = packed.unflatten(-1, (-1, ROWS))
        starts = [(panel.start, panel.start + layout.scale_vectors(panel.groups)) for panel in layout.panels]
        scales = [vectors[..., start:end, :].contiguous() for start, end in starts]
    if not all(bool(halves.view(layout.scale_dtype).isfinite().all()) for halves in scales):
        raise ValueError("a scale is infinite or NaN")


def _scale_vectors(scales: Tensor) -> Tensor:
    """[16 * R, groups] to vectors [R, ceil(groups / 2), 16] whose word r holds two groups of row r."""
    even = pad_to(scales, scales.shape[0], 2 * ceil_div(scales.shape[1], 2))
    pairs = even.unflatten(1, (-1, 2)).unflatten(0, (-1, ROWS))
    return as_vectors(pairs.permute(0, 2, 1, 3).flatten(1))
