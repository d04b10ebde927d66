"""GPTQ's packed tensors, version 2: ``w[n, k] = scale[g, n] * (q[k, n] - zero[g, n])`` with g = g_idx[k].

Per matrix [N, K]: ``qweight`` int32 [K * bits / 32, N] and ``qzeros`` int32 [groups, N * bits / 32] are dense streams
of bits down the columns and along the rows; ``scales`` float16 [groups, N]; ``g_idx`` int32 [K]. Zero points are
stored as they are (version 1 stored them less one). N and K are multiples of 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_spqr.formats.affine import AffineLayout, AffineWeight
from hf_spqr.formats.bitstream import WORD, pack_bits, unpack_bits
from hf_spqr.formats.panels import GROUP_SIZES, ceil_div

TENSORS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)
"""Widths that readers of the format know."""
LARGEST_GROUP = max(GROUP_SIZES)
"""Columns that share a scale in our format; theirs may be larger."""


def encode(weight: AffineWeight) -> dict[str, Tensor]:
    """Write a matrix; bfloat16 scales become float16. A symmetric matrix gets the zero point ``2**(bits - 1)``.

    Raises ValueError for other widths than 2, 3, 4 and 8, sides that are no multiples of 32, and scales beyond fp16.
    """
    lay = weight.layout
    if lay.bits not in BITS:
        raise ValueError(f"GPTQ v2 has bits {', '.join(map(str, BITS))}; this matrix has {lay.bits}")
    if lay.out_features % WORD or lay.in_features % WORD:
        raise ValueError(f"GPTQ v2 needs multiples of {WORD}, this matrix is {lay.out_features} x {lay.in_features}")
    scales = weight.scales.to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("the scales are beyond the range of float16, which GPTQ v2 stores them in")
    zeros = weight.zeros if weight.zeros is not None else torch.full_like(scales, lay.middle).to(torch.uint8)
    group = torch.arange(lay.in_features, dtype=torch.int32) // _width(lay)
    codes = weight.codes
    if weight.perm is not None:
        back = torch.argsort(weight.perm.long())
        group, codes = group[back], codes[:, back]
    return {
        "qweight": pack_bits(codes, lay.bits).T.contiguous(),
        "qzeros": pack_bits(zeros.T.contiguous(), lay.bits),
        "scales": scales.T.contiguous(),
        "g_idx": group.contiguous(),
    }


def decode(bits: int, tensors: Mapping[str, Tensor]) -> AffineWeight:
    """Read a matrix; ``g_idx`` may be missing (groups in order). Columns are reordered where the groups are mixed.

    Groups of more than 128 columns are cut into groups of 128 with the same statistics.
    Raises ValueError if the tensors do not fit each other or the groups are not all equally long.
    """
    if bits not in BITS:
        raise ValueError(f"GPTQ v2 has bits {', '.join(map(str, BITS))}, got {bits}")
    words, scales = tensors["qweight"], tensors["scales"].to(torch.float16)
    groups, rows = scales.shape
    columns = words.shape[0] * WORD // bits
    if words.shape[1] != rows or tensors["qzeros"].shape != (groups, ceil_div(rows * bits, WORD)):
        raise ValueError(
            f"qweight {list(words.shape)}, qzeros {list(tensors['qzeros'].shape)} and scales {list(scales.shape)} do"
            f" not belong together at {bits} bits"
        )
    codes = unpack_bits(words.T.contiguous(), bits, columns)
    size = ceil_div(columns, groups)
    group = tensors.get("g_idx")
    group = torch.arange(columns) // size if group is None else group.long()
    expected = torch.arange(columns, device=group.device) // size
    order = torch.argsort(group, stable=True)
    if group.numel() != columns or not torch.equal(group[order], expected):
        raise ValueError(f"g_idx does not cut {columns} columns into {groups} groups of {size}")
    perm = None if torch.equal(group, expected) else order.to(torch.int32)
    zeros = unpack_bits(tensors["qzeros"], bits, rows).T
    scales = scales.T
    if groups > 1 and size > LARGEST_GROUP and size % LARGEST_GROUP == 0:
        parts, size = size // LARGEST_GROUP, LARGEST_GROUP
        zeros, scales = (t.repeat_interleave(parts, 1)[:, : ceil_div(columns, size)] for t in (zeros, scales))
    layout = AffineLayout(rows, columns, bits, -1 if groups == 1 else size)
    return AffineWeight(
        layout=layout,
        codes=codes if perm is None else codes[:, order].contiguous(),
        scales=scales.contiguous(),
        zeros=zeros.contiguous(),
        perm=perm,
    )


def _width(lay: AffineLayout) -> int:
    return lay.in_features if lay.per_channel else lay.group_size
