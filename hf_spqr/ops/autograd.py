"""Shapes for tracing (fake implementations) and gradients. Packed weights are constants: only x and bias get one."""

from typing import Any

import torch
from torch import Tensor

from hf_spqr.ops.schema import FLOATS


def fake_linear(x: Tensor, out_features: int) -> Tensor:
    torch._check(x.dtype in FLOATS, lambda: f"x must be float32, bfloat16 or float16, got {x.dtype}")
    return x.new_empty((*x.shape[:-1], out_features))


def register(namespace: str) -> None:
    """Register fakes and gradients of all ops; once, after the ops are defined."""

    @torch.library.register_fake(f"{namespace}::spqr_linear")
    def _(x, packed, outlier_row, outlier, perm, bias, out_features, *layout):
        return fake_linear(x, out_features)

    @torch.library.register_fake(f"{namespace}::affine_linear")
    def _(x, packed, perm, bias, out_features, *layout):
        return fake_linear(x, out_features)

    @torch.library.register_fake(f"{namespace}::spqr_dequantize")
    def _(packed, outlier_row, outlier, perm, out_features, in_features, *layout_and_dtype):
        return packed.new_empty((out_features, in_features), dtype=layout_and_dtype[-1])

    @torch.library.register_fake(f"{namespace}::affine_dequantize")
    def _(packed, perm, out_features, in_features, *layout_and_dtype):
        return packed.new_empty((out_features, in_features), dtype=layout_and_dtype[-1])

    @torch.library.register_fake(f"{namespace}::quantize_activation")
    def _(x, perm, bits, symmetric):
        torch._check(x.dtype in FLOATS, lambda: f"x must be float32, bfloat16 or float16, got {x.dtype}")
        one = (*x.shape[:-1], 1)
        return (
            x.new_empty(x.shape, dtype=torch.int8),
            x.new_empty(one, dtype=torch.float32),
            x.new_empty(one, dtype=torch.int32),
        )

    @torch.library.register_fake(f"{namespace}::w_int8_linear")
    def _(code, scale, zero, packed, bias, out_features, bits, group_size, symmetric, scale_bf16, dtype, act_bits=8):
        torch._check(code.dtype == torch.int8, lambda: f"code must be int8, got {code.dtype}")
        return code.new_empty((*code.shape[:-1], out_features), dtype=dtype)

    ops = getattr(torch.ops, namespace)
    torch.library.register_autograd(
        f"{namespace}::spqr_linear", _backward(ops.spqr_dequantize, 4), setup_context=_save(4)
    )
    torch.library.register_autograd(
        f"{namespace}::affine_linear", _backward(ops.affine_dequantize, 2), setup_context=_save(2)
    )
    for name in ("quantize_activation", "w_int8_linear"):
        torch.library.register_autograd(f"{namespace}::{name}", _no_gradient(name))


def _no_gradient(name: str) -> Any:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{name} works on integers and has no gradient; integer_linear has one")

    return backward


def _save(packed_tensors: int) -> Any:
    """Inputs: x, packed tensors (perm the last, maybe None), bias, out_features, the layout's numbers, a flag."""

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, *rest = inputs
        ctx.save_for_backward(*rest[:packed_tensors])
        ctx.in_features, ctx.dtype = x.shape[-1], x.dtype
        ctx.bias_at = 1 + packed_tensors
        ctx.out_features, *ctx.layout, _ = rest[packed_tensors + 1 :]
        ctx.inputs = len(inputs)

    return setup_context


def _backward(dequantize: Any, packed_tensors: int) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * ctx.inputs
        if ctx.needs_input_grad[0]:
            weight = dequantize(*ctx.saved_tensors, ctx.out_features, ctx.in_features, *ctx.layout, ctx.dtype)
            grads[0] = grad @ weight
        if ctx.needs_input_grad[ctx.bias_at]:
            grads[ctx.bias_at] = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        return tuple(grads)

    return backward
