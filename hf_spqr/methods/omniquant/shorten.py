"""The first tokens of a recorded call, so that checks in float64 need not run over thousands of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_spqr.errors import MISFITS

from .runner import BlockRunner

TOLERANCE = 1e-4


@torch.no_grad()
def short_call(runner: BlockRunner, hidden: Tensor, tokens: int = 48) -> tuple[Tensor, Mapping[str, Any]]:
    """``hidden [1, T, H]`` of sample 0 and its arguments, cut to ``tokens``; as they are where cutting changes them.

    Every dimension of length T of an argument is cut: masks, positions and rotary tables. The block is run both ways,
    and the short call is taken only if it gives the first tokens of the long one (as a causal block does).
    """
    kwargs, length = runner.arguments([0]), hidden.shape[1]
    if length <= tokens:
        return hidden, kwargs
    short = _cut(kwargs, length, tokens)
    whole = runner(hidden, [0])[:, :tokens]
    try:
        part = BlockRunner(runner.block, short, [])(hidden[:, :tokens], [0])
    except MISFITS:  # an argument that cannot be cut this way
        return hidden, kwargs
    if part.shape != whole.shape or not bool((part - whole).norm() <= TOLERANCE * whole.norm()):
        return hidden, kwargs
    return hidden[:, :tokens], short


def _cut(value: Any, length: int, tokens: int) -> Any:
    if isinstance(value, Tensor):
        for dim, size in enumerate(value.shape):
            value = value.narrow(dim, 0, tokens) if size == length else value
        return value
    if type(value) in (tuple, list):
        return type(value)(_cut(item, length, tokens) for item in value)
    if type(value) is dict:
        return {key: _cut(item, length, tokens) for key, item in value.items()}
    return value
