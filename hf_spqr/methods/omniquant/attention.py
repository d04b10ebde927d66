"""Quantize q, k and v where they enter attention, without touching any attention code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .quantizers import quantize_tokens


class QuantizedAttention(TorchFunctionMode):
    """Within it ``scaled_dot_product_attention`` sees q, k, v ``[B, heads, T, D]`` quantized per token and head.

    q and k come after rotary embeddings, as in the paper (section 3.3); probabilities stay in 16 or 32 bit. ``calls``
    counts the attentions that were quantized, so that a caller can tell a model that computes attention another way.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.calls = bits, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        quantized = [quantize_tokens(x, self.bits) if isinstance(x, Tensor) else x for x in args[:3]]
        named = {
            key: quantize_tokens(x, self.bits) if key in ("query", "key", "value") else x for key, x in kwargs.items()
        }
        return func(*quantized, *args[3:], **named)
