"""Packed matrices together with how the ops are called on them and what they must give."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_spqr import ops
from hf_spqr.formats import affine, spqr
from tests.weights import random_affine, random_spqr

ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@dataclass
class Case:
    """``tensors`` and ``numbers`` are the op's arguments beside x, bias, the sizes and a dtype."""

    linear: Any
    dequantize: Any
    tensors: tuple[Tensor | None, ...]
    numbers: tuple[Any, ...]
    weight: Tensor  # float32 [N, K], original column order

    def run(self, x: Tensor, bias: Tensor | None = None, int8_activations: bool = False) -> Tensor:
        return self.linear(x, *self.tensors, bias, self.weight.shape[0], *self.numbers, int8_activations)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.dequantize(*self.tensors, *self.weight.shape, *self.numbers, dtype)

    def check(self, x: Tensor, bias: Tensor | None = None) -> None:
        bits, group_size, *_ = self.numbers
        rounded = x.dtype == torch.bfloat16 and may_round(bits, group_size, x.numel() // x.shape[-1])
        y = self.run(x, bias)
        assert y.dtype == x.dtype
        compare(y, x, self.weight, bias, rounded)


def may_round(bits: int, group_size: int, tokens: int) -> bool:
    """Whether bfloat16 x may be multiplied by weights rounded to bfloat16 on the instruction set in use."""
    if ops.COMPILED and torch.ops.hf_spqr.cpu_isa() in ("avx512_bf16", "amx"):
        return rounds_weights(bits, group_size, tokens)
    return tokens > 64


def rounds_weights(bits: int, group_size: int, tokens: int) -> bool:
    """The rule of docs/cpu.md for AVX-512 BF16 and AMX."""
    if bits not in (2, 3, 4):
        return False
    return tokens > (64 if group_size not in (8, 16) else 24 if bits == 4 else 8)


def compare(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rounded: bool) -> None:
    """Against float64, with the size of the summands as the measure, so that cancellation is not held against ``y``.

    ``rounded``: weights may have been rounded to bfloat16. ``x`` as it was multiplied; the dtype is that of ``y``.
    """
    expected = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    tolerance = (1e-4 + (2**-8 if rounded else 0)) * size
    # q and z are multiplied apart: where they nearly cancel, a float32 rounding of either remains
    cancelled = 2e-6 * x.double().abs().sum(-1, keepdim=True) * weight.abs().max()
    tolerance = tolerance + cancelled + ROUNDING[y.dtype] * expected.abs() + 1e-6
    assert y.shape == expected.shape
    worst = ((y.double() - expected).abs() / tolerance).max().item() if y.numel() else 0.0
    assert worst <= 1, f"{worst:.2f} of the tolerance"


def spqr_case(layout: spqr.SpQRLayout, share: float = 0.05, perm: bool = False, seed: int = 0) -> Case:
    weight = random_spqr(layout, share, perm, seed)
    t = spqr.pack(weight)
    return Case(
        ops.spqr_linear,
        ops.spqr_dequantize,
        (t["packed"], t["outlier_row"], t["outlier"], t.get("perm")),
        (layout.bits, layout.group_size, layout.stat_bits, layout.second_group),
        weight.dequantize(),
    )


def affine_case(layout: affine.AffineLayout, perm: bool = False, seed: int = 0) -> Case:
    return affine_case_of(random_affine(layout, perm, seed))


def affine_case_of(weight: affine.AffineWeight) -> Case:
    layout, t = weight.layout, affine.pack(weight)
    return Case(
        ops.affine_linear,
        ops.affine_dequantize,
        (t["packed"], t.get("perm")),
        (layout.bits, layout.group_size, layout.symmetric, layout.scale_dtype == torch.bfloat16),
        weight.dequantize(),
    )
