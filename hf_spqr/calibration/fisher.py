"""How much the model's output changes with the hidden states after each block: the Fisher information.

An error d of a block's output makes the model's distribution diverge by d^T F d / 2 nats, to second order. F is the
mean of g g^T with g the gradient of log p(y) with respect to the output, y drawn from the model's own distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hf_spqr.calibration.blocks import Block, finish
from hf_spqr.errors import UnsupportedLayerError

__all__ = ["FisherSum", "gradient_at_the_end", "through_block"]


def gradient_at_the_end(
    model: nn.Module, blocks: Sequence[Block], ids: Tensor, hidden: Tensor, seed: int = 0
) -> Tensor:
    """Gradient of the sum over tokens of log p(y), y drawn by ``seed``, with respect to ``hidden``, in its shape.

    hidden: what the last of ``blocks`` gives for the token ids [n, T]. The blocks are not run for it.

    Raises:
        UnsupportedLayerError: the model gives no logits [n, T, V], or they do not depend on ``hidden``.
        What the model raises.
    """
    device = next(blocks[-1].module.parameters()).device
    with torch.enable_grad():
        leaf = hidden.detach().to(device).requires_grad_()
        logits = getattr(finish(model, blocks, ids, leaf), "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape or not logits.requires_grad:
            raise UnsupportedLayerError(f"{type(model).__name__} gives no logits for each token")
        logarithms = logits.float().log_softmax(-1)
        generator = torch.Generator(logits.device).manual_seed(seed)
        drawn = torch.multinomial(logarithms.detach().exp().flatten(0, 1), 1, generator=generator)
        likelihood = logarithms.flatten(0, 1).gather(-1, drawn).sum()
        (gradient,) = torch.autograd.grad(likelihood, leaf)
    return gradient


def through_block(call: Callable[[Tensor], Tensor], hidden: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to ``hidden``, where that with respect to ``call(hidden)`` is ``gradient``."""
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        output = call(leaf)
        (before,) = torch.autograd.grad(output, leaf, gradient.to(output))
    return before


class FisherSum:
    """Sum of g g^T over gradients g [H], ``moments`` [H, H] in host memory, and their number, ``tokens`` [1]."""

    def __init__(self, width: int) -> None:
        self.moments = torch.zeros(width, width)
        self.tokens = torch.zeros(1, dtype=torch.int64)

    def add(self, gradient: Tensor) -> None:
        """Add the gradients [..., H] of some tokens, unless one of them is not finite."""
        rows = gradient.float().flatten(0, -2)
        product = rows.T @ rows
        if bool(torch.isfinite(product).all()):
            self.moments += product.cpu()
            self.tokens += len(rows)

    def information(self) -> Tensor | None:
        """F as float32 [H, H], divided by the mean of its diagonal; None where no gradient but zero has come.

        Few tokens know nothing of some directions: F is that of the gradients and of H more, one for each direction,
        of the same mean square.
        """
        mean = float(self.moments.diagonal().mean())
        if not mean > 0:
            return None
        width, tokens = len(self.moments), int(self.tokens)
        return (self.moments / mean).lerp_(torch.eye(width), width / (width + tokens))
