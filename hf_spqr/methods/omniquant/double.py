"""Run a block in true float64: norms and softmaxes that widen to float32 on their own are kept at float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

GROUPED = tuple(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None)


class KeepDouble(TorchFunctionMode):
    """Within it, a request to turn a float64 tensor into float32 leaves it in float64.

    Grouped products of experts, whose kernel has no float64, are made one expert at a time.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func in GROUPED and args[0].dtype == torch.float64:
            return _grouped(*args, **kwargs)
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _grouped(rows: Tensor, weights: Tensor, offs: Tensor, **kwargs: Any) -> Tensor:
    """Rows ``offs[e - 1]`` to ``offs[e]`` of ``rows [T, K]`` times ``weights[e] [K, N]``."""
    out, start = rows.new_zeros(len(rows), weights.shape[-1]), 0
    for expert, end in enumerate(offs.tolist()):
        out[start:end] = rows[start:end] @ weights[expert]
        start = end
    return out


def cast(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Tensors inside nested tuples, lists and dicts on ``device``, floating ones as ``dtype``; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if type(value) in (tuple, list):
        return type(value)(cast(item, dtype, device) for item in value)
    if type(value) is dict:
        return {key: cast(item, dtype, device) for key, item in value.items()}
    return value
