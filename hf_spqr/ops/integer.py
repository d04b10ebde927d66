"""Linear layers that run on integers: each token of the input is quantized, then multiplied by ``w_int8_linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_spqr.ops import reference as plain

Layout = tuple[int | bool, ...]
"""bits, group_size, symmetric, scale_bf16 of the weights."""


def integer_linear(
    x: Tensor,
    packed: Tensor,
    perm: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    layout: Layout,
    act_bits: int,
    act_sym: bool,
    reference: bool = False,
) -> Tensor:
    """x [..., in_features] -> [..., out_features], same dtype; ``bias`` too.

    The gradient is that of the dense layer: rounding and clamping pass it on unchanged (straight through).
    ``reference``: in plain PyTorch.
    """
    arguments = (x, bias, packed, perm, out_features, layout, act_bits, act_sym, reference)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _StraightThrough.apply(*arguments)
    if reference or torch.compiler.is_compiling():
        return _run(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # as in call_linear
        return _run(*arguments)


def _run(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    perm: Tensor | None,
    out_features: int,
    layout: Layout,
    act_bits: int,
    act_sym: bool,
    reference: bool,
) -> Tensor:
    ops: Any = plain if reference else torch.ops.hf_spqr
    code, scale, zero = ops.quantize_activation(x, perm, act_bits, act_sym)
    return ops.w_int8_linear(code, scale, zero, packed, bias, out_features, *layout, x.dtype, act_bits)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """``arguments`` are those of :func:`_run`."""
        x, _, packed, perm, out_features, ctx.layout, _, _, ctx.reference = arguments
        ctx.save_for_backward(packed, perm)
        ctx.sizes, ctx.dtype = (out_features, x.shape[-1]), x.dtype
        return _run(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            ops: Any = plain if ctx.reference else torch.ops.hf_spqr
            of_x = grad @ ops.affine_dequantize(*ctx.saved_tensors, *ctx.sizes, *ctx.layout, ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        return of_x, of_bias, None, None, None, None, None, None, None
