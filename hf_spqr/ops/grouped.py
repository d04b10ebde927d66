"""Linear layers of many experts in one opaque op: rows sorted by expert in, each times the matrix of its expert out.

How many rows each expert has is known only at run time, so a loop over experts cannot be traced; inside an op it can
stay a loop. ``ends`` int64 [E] says where the rows of each expert end; rows after the last end belong to nobody and
give zeros. The tensors are those of :mod:`hf_spqr.formats` with one dimension more, [E, ...], except that the
outliers, whose number differs, follow each other in one tensor; ``outlier_row`` [E, out_features + 1] counts from 0
for each expert. ``transpose`` multiplies by the matrix instead of by its transpose: x [S, out_features] gives
[S, in_features], which is the gradient. ``int8_activations`` as in :mod:`hf_spqr.ops.schema`; a gradient is exact.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_spqr.ops import reference
from hf_spqr.ops.autograd import fake_linear

_SHAPE = "int out_features, int in_features"
SCHEMAS = {
    "spqr_grouped_linear": "(Tensor x, Tensor ends, Tensor packed, Tensor outlier_row, Tensor outlier, Tensor? perm, "
    f"{_SHAPE}, int bits, int group_size, int stat_bits, int second_group, bool int8_activations, bool transpose) "
    "-> Tensor",
    "affine_grouped_linear": "(Tensor x, Tensor ends, Tensor packed, Tensor? perm, "
    f"{_SHAPE}, int bits, int group_size, bool symmetric, bool scale_bf16, bool int8_activations, bool transpose) "
    "-> Tensor",
    "integer_grouped_linear": "(Tensor x, Tensor ends, Tensor packed, Tensor? perm, "
    f"{_SHAPE}, int bits, int group_size, bool symmetric, bool scale_bf16, int act_bits, bool act_sym) -> Tensor",
}

Linear = Callable[..., Tensor]


def split_outliers(outlier_row: Tensor, outlier: Tensor) -> tuple[Tensor, ...]:
    """The outliers [nnz] of all experts as one tensor for each."""
    return outlier.split(outlier_row[:, -1].tolist())


def spqr_grouped_linear(
    linear: Linear,
    dequantize: Linear,
    x: Tensor,
    ends: Tensor,
    packed: Tensor,
    outlier_row: Tensor,
    outlier: Tensor,
    perm: Tensor | None,
    *shape_and_layout: Any,
) -> Tensor:
    """x [S, in_features] -> [S, out_features] by ``linear`` and ``dequantize``; other arguments as in the schema."""
    _check_experts(packed, outlier_row=outlier_row, perm=perm)
    starts = [0, *outlier_row[:, -1].cumsum(0).tolist()]
    if outlier.shape[0] != starts[-1]:
        raise ValueError(f"outlier must hold the {starts[-1]} outliers that outlier_row counts, got {len(outlier)}")

    def tensors(expert: int) -> tuple[Tensor | None, ...]:
        own = outlier[starts[expert] : starts[expert + 1]]
        return packed[expert], outlier_row[expert], own, None if perm is None else perm[expert]

    return _loop(linear, dequantize, x, ends, packed.shape[0], tensors, *shape_and_layout)


def affine_grouped_linear(
    linear: Linear,
    dequantize: Linear,
    x: Tensor,
    ends: Tensor,
    packed: Tensor,
    perm: Tensor | None,
    *shape_and_layout: Any,
) -> Tensor:
    """x [S, in_features] -> [S, out_features] by ``linear`` and ``dequantize``; other arguments as in the schema."""
    _check_experts(packed, perm=perm)

    def tensors(expert: int) -> tuple[Tensor | None, ...]:
        return packed[expert], None if perm is None else perm[expert]

    return _loop(linear, dequantize, x, ends, packed.shape[0], tensors, *shape_and_layout)


def integer_grouped_linear(
    quantize: Callable[..., tuple[Tensor, ...]],
    linear: Linear,
    x: Tensor,
    ends: Tensor,
    packed: Tensor,
    perm: Tensor | None,
    out_features: int,
    in_features: int,
    *layout_and_act: Any,
) -> Tensor:
    """x [S, in_features] -> [S, out_features], the rows quantized first; other arguments as in the schema."""
    _check_experts(packed, perm=perm)
    *layout, act_bits, act_sym = layout_and_act
    y = x.new_zeros((x.shape[0], out_features))
    for expert, begin, end in _rows(x, ends, packed.shape[0], in_features):
        codes = quantize(x[begin:end], None if perm is None else perm[expert], act_bits, act_sym)
        y[begin:end] = linear(*codes, packed[expert], None, out_features, *layout, x.dtype, act_bits)
    return y


def _loop(
    linear: Linear,
    dequantize: Linear,
    x: Tensor,
    ends: Tensor,
    experts: int,
    tensors: Callable[[int], tuple[Tensor | None, ...]],
    out_features: int,
    in_features: int,
    *layout_and_flags: Any,
) -> Tensor:
    *layout, int8_activations, transpose = layout_and_flags
    y = x.new_empty((x.shape[0], in_features if transpose else out_features))
    last = 0
    for expert, begin, end in _rows(x, ends, experts, out_features if transpose else in_features):
        if transpose:
            weight = dequantize(*tensors(expert), out_features, in_features, *layout, x.dtype)
            torch.mm(x[begin:end], weight, out=y[begin:end])
        else:
            y[begin:end] = linear(x[begin:end], *tensors(expert), None, out_features, *layout, int8_activations)
        last = end
    y[last:].zero_()
    return y


def _check_experts(packed: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless the tensors beside ``packed`` [E, ...] are those of as many experts."""
    for name, tensor in others.items():
        if tensor is not None and tensor.shape[:1] != packed.shape[:1]:
            raise ValueError(f"{name} must be of {packed.shape[0]} experts, got {list(tensor.shape)}")


def _rows(x: Tensor, ends: Tensor, experts: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """Expert, first row and row after the last, for experts that have rows.

    Raises ValueError unless x is [S, columns] and ends int64 [experts], rising from 0 on to at most S.
    """
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"x must be [rows, {columns}], got {list(x.shape)}")
    if ends.dtype != torch.int64 or ends.shape != (experts,):
        raise ValueError(f"ends must be torch.int64 [{experts}], got {ends.dtype} {list(ends.shape)}")
    numbers = [0, *ends.tolist(), x.shape[0]]
    if numbers != sorted(numbers):
        raise ValueError(f"ends must rise from 0 on and end at or before row {x.shape[0]}, got {numbers[1:-1]}")
    begin = 0
    for expert, end in enumerate(numbers[1:-1]):
        if end > begin:
            yield expert, begin, end
        begin = end


def register(library: torch.library.Library, namespace: str) -> None:
    """Define the ops with fake and gradient of x; once, after the linear ops are defined."""
    ops = getattr(torch.ops, namespace)
    kernels: dict[str, tuple[Linear, Linear, Linear, int]] = {
        "spqr_grouped_linear": (spqr_grouped_linear, ops.spqr_linear.default, ops.spqr_dequantize.default, 4),
        "affine_grouped_linear": (affine_grouped_linear, ops.affine_linear.default, ops.affine_dequantize.default, 2),
    }
    for name, (loop, linear, dequantize, packed_tensors) in kernels.items():
        library.define(name + SCHEMAS[name])
        library.impl(name, _bind(loop, linear, dequantize), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", _fake(2 + packed_tensors))
        backward, setup = _gradient(getattr(ops, name).default, packed_tensors)
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup)
    _register_integer(library, namespace)


def _register_integer(library: torch.library.Library, namespace: str) -> None:
    """The gradient passes the quantization of x unchanged: it is that of affine_grouped_linear."""
    name, ops = "integer_grouped_linear", getattr(torch.ops, namespace)
    library.define(name + SCHEMAS[name])
    run = _bind(integer_grouped_linear, ops.quantize_activation.default, ops.w_int8_linear.default)
    library.impl(name, run, "CompositeExplicitAutograd")

    def fake(x: Tensor, ends: Tensor, packed: Tensor, perm: Tensor | None, out_features: int, *rest: Any) -> Tensor:
        return fake_linear(x, out_features)

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:4])
        ctx.numbers = inputs[4:-2]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[0]
        of_x = ops.affine_grouped_linear(grad, *ctx.saved_tensors, *ctx.numbers, False, True) if wanted else None
        return (of_x, *[None] * (5 + len(ctx.numbers)))

    torch.library.register_fake(f"{namespace}::{name}", fake)
    torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup_context)


def _bind(loop: Linear, linear: Linear, dequantize: Linear) -> Linear:
    def run(*arguments: Any) -> Tensor:
        return loop(linear, dequantize, *arguments)

    return run


def _fake(shape_at: int) -> Linear:
    def fake(*arguments: Any) -> Tensor:
        out_features, in_features = arguments[shape_at : shape_at + 2]
        return fake_linear(arguments[0], in_features if arguments[-1] else out_features)

    return fake


def _gradient(op: Linear, packed_tensors: int) -> tuple[Any, Any]:
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1 : 2 + packed_tensors])
        *ctx.numbers, ctx.transpose = inputs[2 + packed_tensors :]
        ctx.inputs = len(inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * ctx.inputs
        if ctx.needs_input_grad[0]:
            grads[0] = op(grad, *ctx.saved_tensors, *ctx.numbers, not ctx.transpose)
        return tuple(grads)

    return backward, setup_context


def reference_spqr_grouped_linear(*arguments: Any) -> Tensor:
    """The op in plain PyTorch."""
    return spqr_grouped_linear(reference.spqr_linear, reference.spqr_dequantize, *arguments)


def reference_affine_grouped_linear(*arguments: Any) -> Tensor:
    """The op in plain PyTorch."""
    return affine_grouped_linear(reference.affine_linear, reference.affine_dequantize, *arguments)


def reference_integer_grouped_linear(x: Tensor, *arguments: Any) -> Tensor:
    """The op in plain PyTorch."""
    y = integer_grouped_linear(reference.quantize_activation, reference.w_int8_linear, x, *arguments)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return y
    return _Instead.apply(reference_affine_grouped_linear(x, *arguments[:-2], False), y)


class _Instead(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, differentiable: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
