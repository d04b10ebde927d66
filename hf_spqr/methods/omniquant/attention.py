"""Quantize q, k and v where they enter attention, without touching any attention code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .quantizers import quantize_tokens

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)


class QuantizedAttention(TorchFunctionMode):
    """Within it attention sees q, k, v ``[B, heads, T, D]`` quantized per token and head.

    q and k come after rotary embeddings, as in the paper (section 3.3); probabilities stay as they are. Both ways of
    writing attention are known: ``scaled_dot_product_attention``, and a product of 4-D tensors (q with k transposed),
    a softmax, and a product with v. ``calls`` counts the attentions that were quantized, so that a caller can tell a
    block that computes attention another way.
    """

    def __init__(self, bits: int, symmetric: bool = False) -> None:
        super().__init__()
        self.bits, self.symmetric, self.calls = bits, symmetric, 0
        self._open = self._weighed = False  # q k^T seen; its softmax seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            named = {key: self._tokens(x) if key in ("query", "key", "value") else x for key, x in kwargs.items()}
            return func(*map(self._tokens, args[:3]), *args[3:], **named)
        if func in SOFTMAXES:
            self._weighed = self._open
        elif func in PRODUCTS and len(args) == 2 and args[0].dim() == args[1].dim() == 4:
            first, second = args
            if self._weighed:
                self.calls, self._open, self._weighed = self.calls + 1, False, False
                return func(first, self._tokens(second))
            self._open = True
            return func(self._tokens(first), self._tokens(second.transpose(-1, -2)).transpose(-1, -2))
        return func(*args, **kwargs)

    def _tokens(self, x: Any) -> Any:
        return quantize_tokens(x, self.bits, self.symmetric) if isinstance(x, Tensor) else x
