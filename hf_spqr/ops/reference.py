"""Every op in plain PyTorch, for any device: the oracle of the tests, and what runs where no kernel was compiled.

Arguments as in :mod:`hf_spqr.ops.schema`. Weights and sums are float32; only the result is rounded to the dtype of
``x``.
"""

import torch
from torch import Tensor

from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout
from hf_spqr.formats.tokens import code_range, token_grid
from hf_spqr.ops.schema import FLOATS

__all__ = [
    "affine_dequantize", "affine_linear", "quantize_activation", "round_activations", "spqr_dequantize", "spqr_linear",
    "w_int8_linear",
]  # fmt: skip

EXACT_COLUMNS = 256  # whose products of two numbers of eight bits and a sign float32 adds up without rounding
ROUNDED_COLUMNS = 128  # that share a scale where activations are rounded to int8


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
    _check_float("dtype", dtype)
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
    int8_activations: bool = False,
) -> Tensor:
    """x [..., in_features] -> [..., out_features], same dtype."""
    weight = spqr_dequantize(
        packed, outlier_row, outlier, perm, out_features, x.shape[-1], bits, group_size, stat_bits, second_group,
        torch.float32,
    )  # fmt: skip
    return _linear(x, weight, bias, perm, int8_activations)


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
    _check_float("dtype", dtype)
    layout = _affine_layout(out_features, in_features, bits, group_size, symmetric, scale_bf16)
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
    int8_activations: bool = False,
) -> Tensor:
    """x [..., in_features] -> [..., out_features], same dtype."""
    weight = affine_dequantize(
        packed, perm, out_features, x.shape[-1], bits, group_size, symmetric, scale_bf16, torch.float32
    )
    return _linear(x, weight, bias, perm, int8_activations)


def round_activations(x: Tensor, perm: Tensor | None = None) -> Tensor:
    """``x [..., K]`` as float32, each token rounded to int8 in blocks of 128 columns of the stored order.

    A block's values become ``code * scale`` with ``scale = max|x| / 127`` and ``code = round(x / scale)`` to nearest
    even. A block none of whose values is above 1e-30 is zero; one with NaN or infinity is NaN. Stored column j is
    column ``perm[j]`` of ``x`` (int32 [K]).
    """
    columns = x.shape[-1]
    stored = (x if perm is None else x.index_select(-1, perm)).float()
    blocks = torch.nn.functional.pad(stored, (0, -columns % ROUNDED_COLUMNS)).unflatten(-1, (-1, ROUNDED_COLUMNS))
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = largest / 127
    codes = (blocks / scale).round().masked_fill(largest <= 1e-30, 0)
    rounded = (codes * scale).flatten(-2)[..., :columns]
    return rounded if perm is None else torch.empty_like(rounded).index_copy_(-1, perm.long(), rounded)


def quantize_activation(x: Tensor, perm: Tensor | None, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``x [..., K]`` as integers: int8 code ``[..., K]``, float32 scale and int32 zero ``[..., 1]``.

    ``x`` is about ``scale * (code - zero)`` on the grid of :func:`token_grid`, ``round(x / scale)`` to nearest even.
    Asymmetric codes and zero points are stored shifted by ``2 ** (bits - 1)``, so that they fit int8. Column j of the
    codes is column ``perm[j]`` of ``x`` (int32 [K]). bits 2 to 8. A token whose scale is NaN has zeros for its codes
    and its zero point: all that is made from it is NaN. Raises ValueError if bits or a tensor is none of these.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"quantize_activation: bits must be 2 to 8, got {bits}")
    _check_float("x", x.dtype)
    _check_tensor("perm", perm, torch.int32, x.shape[-1:])
    if perm is not None:
        x = x.index_select(-1, perm)
    scale, zero = token_grid(x, bits, symmetric)
    shift = 0 if symmetric else 2 ** (bits - 1)
    steps = ((x.float() / scale).round() + zero).clamp(*code_range(bits, symmetric)) - shift
    bad = scale.isnan()
    return steps.masked_fill(bad, 0).to(torch.int8), scale, (zero - shift).masked_fill(bad, 0).to(torch.int32)


def w_int8_linear(
    code: Tensor,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_bf16: bool,
    dtype: torch.dtype,
    act_bits: int = 8,
) -> Tensor:
    """code int8 [..., in_features], scale float32 and zero int32 [..., 1] -> [..., out_features] of ``dtype``.

    ``act_bits``, 2 to 8, says what the codes fit; the result does not depend on it.

    With the weights' codes Q_w, zero points z_w and scales s_w, and all columns, or those of a group, in the sums::

        I = sum (code - zero) (Q_w - z_w) = code.Q_w - zero sum Q_w - z_w sum code + K zero z_w

    ``I`` is exact, of any size; it fits int32 up to 33,025 columns. What follows is float32, each operation rounded by
    itself (no fused multiply-add), and is the same to the bit in every kernel::

        one scale per row:  y = float(I) * (scale * s_w)
        groups:             y = (0 + float(I_0) * s_w_0 + float(I_1) * s_w_1 + ...) * scale, from left to right

    then ``y + bias`` and one rounding to ``dtype``. ``float(I_g)`` of a group is exact.
    """
    if not 2 <= act_bits <= 8:
        raise ValueError(f"w_int8_linear: act_bits must be 2 to 8, got {act_bits}")
    _check_float("dtype", dtype)
    _check_tensor("bias", bias, dtype, (out_features,))
    _check_tensor("code", code, torch.int8, code.shape)
    _check_tensor("scale", scale, torch.float32, (*code.shape[:-1], 1))
    _check_tensor("zero", zero, torch.int32, (*code.shape[:-1], 1))
    layout = _affine_layout(out_features, code.shape[-1], bits, group_size, symmetric, scale_bf16)
    weight = affine.unpack(layout, {"packed": packed})
    width = EXACT_COLUMNS if layout.per_channel else group_size
    shape = (*code.shape[:-1], out_features)
    total = code.new_zeros(shape, dtype=torch.int64 if layout.per_channel else torch.float32)
    for first in range(0, code.shape[-1], width):
        columns, group = slice(first, first + width), 0 if layout.per_channel else first // width
        middle = layout.middle if weight.zeros is None else weight.zeros[:, group : group + 1].float()
        steps = code[..., columns].float() - zero.float()
        part = torch.nn.functional.linear(steps, weight.codes[:, columns].float() - middle)
        total = total + (part.long() if layout.per_channel else part * weight.scales[:, group].float())
    y = total.float() * (scale * weight.scales[:, 0].float()) if layout.per_channel else total * scale
    return (y if bias is None else y + bias.float()).to(dtype)


def _affine_layout(
    out_features: int, in_features: int, bits: int, group_size: int, symmetric: bool, scale_bf16: bool
) -> AffineLayout:
    scale_dtype = torch.bfloat16 if scale_bf16 else torch.float16
    return AffineLayout(out_features, in_features, bits, group_size, symmetric, scale_dtype)


def _check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {dtype}")


def _check_tensor(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, perm: Tensor | None, int8_activations: bool) -> Tensor:
    _check_float("x", x.dtype)
    _check_tensor("bias", bias, x.dtype, (weight.shape[0],))
    rounded = round_activations(x, perm) if int8_activations else x.float()
    y = torch.nn.functional.linear(rounded, weight)
    return (y if bias is None else y + bias.float()).to(x.dtype)
