"""Call a block as a function of its parameters, on stacked calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_spqr.errors import MISFITS, CalibrationError, UnsupportedLayerError

from .attention import QuantizedAttention
from .double import cast
from .probe import first_tensor
from .quantizers import quantize_tokens

Kwargs = Mapping[str, Any]


class BlockRunner:
    """``block`` with float32 (or autocast bfloat16) arithmetic and parameters given from outside.

    kwargs: what the block itself received, one mapping for all samples or one for each. quantized: names of the
    modules whose inputs are quantized when a run asks for it.
    """

    def __init__(
        self, block: nn.Module, kwargs: Kwargs | Sequence[Kwargs], quantized: Sequence[str], autocast: bool = False
    ) -> None:
        self.block, self.autocast = block, autocast
        self.modules = dict(block.named_modules())
        self.quantized = list(quantized)
        self.device = next(block.parameters()).device
        named = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        self.tensors = {name: cast(value.detach(), torch.float32, self.device) for name, value in named.items()}
        each = [kwargs] if isinstance(kwargs, Mapping) else list(kwargs)
        each = each[:1] if _all_same(each) else each
        self.kwargs = [cast(dict(item), torch.float32, self.device) for item in each]

    def arguments(self, samples: Sequence[int]) -> dict[str, Any]:
        """The block's own keyword arguments for these samples together."""
        if len(self.kwargs) == 1:
            return self.kwargs[0]
        if max(samples) >= len(self.kwargs):
            raise CalibrationError(
                f"kwargs for {len(self.kwargs)} samples, sample {max(samples)} asked for: give one each"
            )
        merged = _merge([self.kwargs[i] for i in samples])
        assert isinstance(merged, dict)
        return merged

    def __call__(
        self,
        hidden: Tensor,
        samples: Sequence[int],
        tensors: Mapping[str, Tensor] | None = None,
        act_bits: int | None = None,
        attention_bits: int | None = None,
        act_sym: bool = False,
    ) -> Tensor:
        """Output ``[B, T, H]`` in float32 for ``hidden [B, T, H]``, the inputs of ``samples``.

        tensors replace the block's own by name; act_bits quantizes the inputs of the quantized modules, attention_bits
        q, k and v, both symmetrically with act_sym.

        Raises:
            UnsupportedLayerError: attention should be quantized but is computed in a way that cannot be seen.
        """
        hidden = hidden.to(self.device, torch.float32)
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast))
            if act_bits is not None:
                for name in self.quantized:
                    handle = self.modules[name].register_forward_pre_hook(_token_hook(act_bits, act_sym))
                    stack.callback(handle.remove)
            mode = None
            if attention_bits is not None:
                mode = stack.enter_context(QuantizedAttention(attention_bits, act_sym))
            merged = {**self.tensors, **(tensors or {})}
            out = first_tensor(functional_call(self.block, merged, (hidden,), self.arguments(samples)))
        if mode is not None and not mode.calls:
            raise UnsupportedLayerError(
                "q, k, v cannot be quantized: the block's attention is neither scaled_dot_product_attention nor plain"
                ' products. Load the model with attn_implementation="sdpa", or set quantize_attention=False.'
            )
        if out is None:
            raise UnsupportedLayerError(f"{type(self.block).__name__} returned no tensor")
        return out.float()

    @torch.no_grad()
    def batches(self, hidden: Tensor) -> bool:
        """Whether the first samples ``hidden [B, T, H]`` can be run together.

        They cannot where an argument folds the batch into the heads, as Bloom's position bias does, or belongs to one
        sequence only.
        """
        samples = list(range(len(hidden)))
        alone = torch.cat([self(hidden[i : i + 1], [i]) for i in samples])
        try:
            together = self(hidden, samples)
        except MISFITS:
            return False
        return together.shape == alone.shape and torch.allclose(together, alone, rtol=1e-2, atol=1e-2)

    def observe(self, names: Sequence[str], see: Callable[[str, Tensor], None]) -> ExitStack:
        """A context in which ``see(name, input)`` is told every input of the named modules."""
        stack = ExitStack()
        for name in names:

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                value = first_tensor([*args, *kwargs.values()])
                if value is not None:
                    see(name, value.detach())

            stack.callback(self.modules[name].register_forward_pre_hook(hook, with_kwargs=True).remove)
        return stack


def _token_hook(bits: int, symmetric: bool) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantize_tokens(args[0], bits, symmetric), *args[1:])

    return hook


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    try:
        return bool(a == b)
    except (RuntimeError, TypeError, ValueError):
        return False


def _all_same(items: Sequence[Any]) -> bool:
    return all(_same(items[0], item) for item in items[1:])


def _merge(items: Sequence[Any]) -> Any:
    """One value for several samples: the common one, or tensors of batch size 1 put together along the batch."""
    first = items[0]
    if _all_same(items):
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(items), 0)
    if isinstance(first, dict):
        return {key: _merge([item[key] for item in items]) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(_merge(list(values)) for values in zip(*items, strict=True))
    raise CalibrationError(
        f"samples have different arguments that cannot be batched ({type(first).__name__}): batch_size=1"
    )
