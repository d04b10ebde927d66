"""Random layers for the tests of the methods."""

import torch
from torch import Tensor


def random_layer(rows: int, columns: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails and the Hessian of correlated inputs with a few hot channels, float32."""
    g = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(rows, columns, generator=g)
    weight *= 1 + 4 * (torch.rand(rows, columns, generator=g) < 0.02)
    tokens = tokens or 8 * columns
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=g) / columns**0.5
    scale = torch.exp(0.7 * torch.randn(columns, generator=g))
    scale[torch.randperm(columns, generator=g)[: max(1, columns // 50)]] *= 10
    x = torch.randn(tokens, columns, generator=g) @ mixing * scale
    hessian = x.T @ x / tokens
    return weight, hessian + hessian.T


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Relative error of the output in float64, straight from the definition."""
    weight, difference, hessian = weight.double(), quantized.double() - weight.double(), hessian.double()
    spent = torch.trace(difference @ hessian @ difference.T)
    return float((spent / torch.trace(weight @ hessian @ weight.T)).sqrt())
