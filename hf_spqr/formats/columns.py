"""The order of columns and the size in bytes, common to all packed matrices."""

from collections.abc import Mapping

import torch
from torch import Tensor


def permute_back(weight: Tensor, perm: Tensor | None) -> Tensor:
    """Columns [N, K] from stored to original order: stored column j is original column ``perm[j]``."""
    if perm is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, perm.long(), weight)


def check_perm(perm: Tensor, in_features: int) -> None:
    """Raise ValueError unless ``perm`` is int32 and holds each of 0 .. in_features - 1 once (kernels trust it)."""
    if perm.dtype != torch.int32:
        raise ValueError(f"perm must be torch.int32, got {perm.dtype}")
    expected = torch.arange(in_features, dtype=torch.int32, device=perm.device)
    if perm.shape != expected.shape or not torch.equal(perm.sort().values, expected):
        raise ValueError(f"perm must hold each of 0 .. {in_features - 1} once")


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a packed matrix as in the file: statistics, outliers, row counters and permutation included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
