"""Every op in plain PyTorch, for any device: the oracle of the tests, and what runs where no kernel was compiled.

Arguments as in :mod:`hf_spqr.ops.schema`. Weights and sums are float32; only the result is rounded to the dtype of
``x``.
"""

import torch
from torch import Tensor

from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout


def spqr_dequantize(
    packed: Tensor,
    outlier_row: Tensor,
    outlier: Tensor,
    perm: Tensor | None,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    stat_bits: int,
    second_group: int,
    dtype: torch.dtype,
) -> Tensor:
    """[out_features, in_features] of ``dtype``, columns in the original order."""
    layout = SpQRLayout(out_features, in_features, bits, group_size, stat_bits, second_group)
    tensors = {"packed": packed, "outlier_row": outlier_row, "outlier": outlier}
    if perm is not None:
        tensors["perm"] = perm
    return spqr.unpack(layout, tensors).dequantize(dtype)


def spqr_linear(
    x: Tensor,
    packed: Tensor,
    outlier_row: Tensor,
    outlier: Tensor,
    perm: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    stat_bits: int,
    second_group: int,
) -> Tensor:
    """x [..., in_features] -> [..., out_features], same dtype."""
    weight = spqr_dequantize(
        packed, outlier_row, outlier, perm, out_features, x.shape[-1], bits, group_size, stat_bits, second_group,
        torch.float32,
    )  # fmt: skip
    return _linear(x, weight, bias)


def affine_dequantize(
    packed: Tensor,
    perm: Tensor | None,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_bf16: bool,
    dtype: torch.dtype,
) -> Tensor:
    """[out_features, in_features] of ``dtype``, columns in the original order."""
    scale_dtype = torch.bfloat16 if scale_bf16 else torch.float16
    layout = AffineLayout(out_features, in_features, bits, group_size, symmetric, scale_dtype)
    tensors = {"packed": packed} if perm is None else {"packed": packed, "perm": perm}
    return affine.unpack(layout, tensors).dequantize(dtype)


def affine_linear(
    x: Tensor,
    packed: Tensor,
    perm: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_bf16: bool,
) -> Tensor:
    """x [..., in_features] -> [..., out_features], same dtype."""
    weight = affine_dequantize(
        packed, perm, out_features, x.shape[-1], bits, group_size, symmetric, scale_bf16, torch.float32
    )
    return _linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.nn.functional.linear(x.float(), weight)
    return (y if bias is None else y + bias.float()).to(x.dtype)
