"""How OmniQuant calls blocks: the sequences in the first dimension, all arguments but the hidden states by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from hf_spqr.calibration.blocks import HIDDEN, Call

__all__ = ["keywords", "sequences_first"]


@contextmanager
def sequences_first(block: nn.Module, dim: int) -> Iterator[None]:
    """``block`` takes and gives hidden states with the sequences in dimension 0 instead of ``dim`` for a while."""
    if dim == 0:
        yield
        return

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (args[0].movedim(0, dim), *args[1:]), kwargs
        return args, {**kwargs, HIDDEN: kwargs[HIDDEN].movedim(0, dim)}

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple | list):
            return (output[0].movedim(dim, 0), *output[1:])
        return output.movedim(dim, 0)

    with ExitStack() as hooks:
        hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(block.register_forward_hook(leave).remove)
        yield


def keywords(block: nn.Module, call: Call) -> dict[str, Any]:
    """All arguments of a call after the hidden states, by name."""
    names = list(inspect.signature(block.forward).parameters)[1:]
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}
