"""The ordinary layers that packed ones stand in for: ``nn.Linear``, and GPT-2's ``Conv1D``, which is its transpose."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["DENSE_CLASSES", "features", "kind", "make_dense", "matrix", "set_matrix"]

DENSE_CLASSES: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)


def features(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an ordinary layer or a packed one."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features  # type: ignore[return-value]


def kind(layer: nn.Module) -> type[nn.Module]:
    """The class of which an equal layer can be made: ``nn.Linear`` also for its subclasses."""
    return Conv1D if isinstance(layer, Conv1D) else nn.Linear


def matrix(layer: nn.Module) -> Tensor:
    """The weight of an ordinary layer as [out_features, in_features]; it shares memory with the layer."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(layer, Conv1D) else weight


def set_matrix(layer: nn.Module, weight: Tensor) -> None:
    """Replace the weight of an ordinary layer by ``weight`` [out_features, in_features]."""
    weight = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
    layer.weight = nn.Parameter(weight, requires_grad=False)


def make_dense(of_class: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """An ordinary layer of class ``of_class`` with ``weight`` [out_features, in_features]."""
    rows, columns = weight.shape
    with torch.device("meta"):
        layer = Conv1D(rows, columns) if of_class is Conv1D else nn.Linear(columns, rows, bias=bias is not None)
    set_matrix(layer, weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
