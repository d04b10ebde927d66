"""Run a block in true float64: norms and softmaxes that widen to float32 on their own are kept at float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class KeepDouble(TorchFunctionMode):
    """Within it, a request to turn a float64 tensor into float32 leaves it in float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def cast(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Tensors inside nested tuples, lists and dicts on ``device``, floating ones as ``dtype``; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if type(value) in (tuple, list):
        return type(value)(cast(item, dtype, device) for item in value)
    if type(value) is dict:
        return {key: cast(item, dtype, device) for key, item in value.items()}
    return value
