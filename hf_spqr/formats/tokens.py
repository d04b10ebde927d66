"""The grid of a token: how activations are quantized, dynamically, each token by itself."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SCALE = 1e-5


def token_grid(x: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Grid of each token: ``x [..., K]`` to float32 scale and integer-valued float32 zero point, both ``[..., 1]``.

    Asymmetric: the range always holds 0, so the zero point lies in ``[0, 2 ** bits - 1]``. Symmetric: the zero point
    is 0 and ``max |x|`` is ``2 ** (bits - 1) - 1`` steps. A token with a NaN or an infinity, or whose range is beyond
    float32, has a NaN for its scale.
    """
    x = x.float()
    if symmetric:
        spread, steps = x.abs().amax(-1, keepdim=True), 2 ** (bits - 1) - 1
    else:
        # not aminmax: torch 2.10 and 2.11 have no derivative of it
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        low = low.clamp(max=0)
        spread, steps = high.clamp(min=0) - low, 2**bits - 1
    # by a tensor: PyTorch divides by a number through its reciprocal on some devices, which rounds otherwise
    scale = (spread / spread.new_full((), steps)).clamp(min=MIN_SCALE).masked_fill(~spread.isfinite(), torch.nan)
    return scale, torch.zeros_like(scale) if symmetric else (-low / scale).round()


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The lowest and the highest code, before the shift of asymmetric ones."""
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def fake_quantize_activation(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """``scale * (code - zero)`` of every element of ``x [..., K]``, in its dtype; bits 2 to 8."""
    scale, zero = token_grid(x, bits, symmetric)
    steps = (x.float() / scale).round().add(zero).clamp(*code_range(bits, symmetric)).sub(zero)
    return (steps * scale).to(x.dtype)
