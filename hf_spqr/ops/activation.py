"""Quantization of activations: dynamic, per token, asymmetric. Plain PyTorch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SCALE = 1e-5


def token_grid(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Grid of each token: ``x [..., K]`` to float32 scale and integer-valued float32 zero point, both ``[..., 1]``.

    The range always holds 0, so the zero point lies in ``[0, 2 ** bits - 1]``.
    """
    low, high = torch.aminmax(x.float(), dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=MIN_SCALE)
    return scale, (-low / scale).round()


def fake_quantize_activation(x: Tensor, bits: int) -> Tensor:
    """``scale * (code - zero)`` of every element of ``x [..., K]``, in its dtype; bits 2 to 8."""
    scale, zero = token_grid(x, bits)
    steps = (x.float() / scale).round().add(zero).clamp(0, 2**bits - 1).sub(zero)
    return (steps * scale).to(x.dtype)
