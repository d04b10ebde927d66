"""The integer formats of compressed-tensors, ``pack-quantized`` and ``int-quantized``: ``w = scale * (q - zero)``.

Both count codes from the middle (``q - 2**(bits - 1)``), have ``weight_scale`` [N, groups] and, where the matrix is
asymmetric, ``weight_zero_point``. ``pack-quantized`` stores ``weight_packed`` int32, a dense stream of bits along each
row, ``weight_shape`` int64 [2], and zero points as a stream down each column; ``int-quantized`` stores ``weight`` and
zero points as int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.formats.affine import AffineWeight
from hf_spqr.formats.bitstream import pack_bits

BITS = range(1, 9)


def pack_quantized(weight: AffineWeight, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors of ``pack-quantized``; scales of ``dtype``, by default as they are. Raises ValueError, see below."""
    lay, codes = weight.layout, original_order(weight)
    tensors = {
        "weight_packed": pack_bits(codes, lay.bits),
        "weight_scale": weight.scales.to(dtype or lay.scale_dtype),
        "weight_shape": torch.tensor([lay.out_features, lay.in_features]),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = pack_bits(weight.zeros.T.contiguous(), lay.bits).T.contiguous()
    return tensors


def int_quantized(weight: AffineWeight, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors of ``int-quantized``; scales of ``dtype``, by default as they are. Raises ValueError, see below."""
    lay, codes = weight.layout, original_order(weight)
    tensors = {
        "weight": (codes.to(torch.int16) - lay.middle).to(torch.int8),
        "weight_scale": weight.scales.to(dtype or lay.scale_dtype),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = (weight.zeros.to(torch.int16) - lay.middle).to(torch.int8)
    return tensors


def original_order(weight: AffineWeight) -> Tensor:
    """Codes with the columns in original order.

    Raises ValueError if groups are mixed (columns were reordered) or the last group is shorter than the others: the
    library knows neither.
    """
    lay = weight.layout
    if not lay.per_channel and lay.in_features % lay.group_size:
        raise ValueError(
            f"compressed-tensors needs whole groups; {lay.in_features} is no multiple of {lay.group_size}"
        )
    if weight.perm is None:
        return weight.codes
    if lay.groups > 1:
        raise ValueError("compressed-tensors has no column order (act_order with groups); quantize without act_order")
    return weight.codes[:, torch.argsort(weight.perm.long())]
