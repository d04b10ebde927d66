"""Differentiable fake quantization of weights and activations, in the grid of the packed affine format.

Every quantizer rounds its scales to the stored 16-bit type and its zero points to integers *inside* the forward pass,
so what training sees is what :meth:`WeightQuantizer.export` hands to the packer, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_spqr.errors import ConfigError
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.tokens import MIN_SCALE, code_range, token_grid

from .params import OmniQuantParams

MAX_SCALE = 6e4  # largest scale that float16 holds, with room for rounding
LWC_INIT = 4.0  # sigmoid(4) = 0.982, section 3.2 as coded


class _FakeQuantize(torch.autograd.Function):
    """``scale * (clamp(round(w / scale + offset) + zero, 0, qmax) - zero)`` with straight-through gradients."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None, qmax: int) -> Tensor:
        ratio = weight / scale
        steps = ratio.round() if offset is None else (ratio + offset).round_()
        lowest, highest = -zero, qmax - zero
        inside = (steps >= lowest) & (steps <= highest)
        steps = torch.minimum(torch.maximum(steps, lowest), highest)
        ctx.save_for_backward(ratio, steps, inside, scale)
        return steps * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        ratio, steps, inside, scale = ctx.saved_tensors
        passed = grad * inside
        need_weight, need_scale, need_zero, need_offset, _ = ctx.needs_input_grad
        d_scale = (grad * steps).sub_(passed * ratio).sum(-1, keepdim=True) if need_scale else None
        d_zero = (passed - grad).sum(-1, keepdim=True) * scale if need_zero else None
        return passed if need_weight else None, d_scale, d_zero, passed * scale if need_offset else None, None


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, qmax: int, offset: Tensor | None = None) -> Tensor:
    """Fake-quantize ``weight`` ``[..., g]`` on the grid ``scale`` ``[..., 1]``, ``zero`` ``[..., 1]`` (integers).

    ``offset`` ``[..., g]`` moves the rounding, in units of the scale. Gradients: straight through the rounding for
    weight and offset, zero where the code is clamped; the scale and the zero point get theirs exactly.
    """
    return _FakeQuantize.apply(weight, scale, zero, offset, qmax)


class _Round(torch.autograd.Function):
    """Round to integers (dtype None) or to a 16-bit type, straight-through."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype | None) -> Tensor:
        return value.round() if dtype is None else value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def round_through(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Round to the nearest integer, or to ``dtype`` and back; the gradient passes unchanged."""
    return _Round.apply(value, dtype)


class _FakeQuantizeTokens(torch.autograd.Function):
    """Straight-through for the values; the range's two ends also carry the gradient of the scale.

    That second part is what tells an equivalent transform that a smaller range helps: straight through alone, its
    scale cancels between activation and weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, symmetric: bool) -> Tensor:
        qmin, qmax = code_range(bits, symmetric)
        scale, zero = token_grid(x, bits, symmetric)
        steps = (x.float() / scale).round_().add_(zero).clamp_(qmin, qmax).sub_(zero)
        ctx.qmax, ctx.symmetric = qmax, symmetric
        ctx.save_for_backward(x, steps, scale)
        return (steps * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        x, steps, scale = ctx.saved_tensors
        slope = (grad * (steps - x / scale)).sum(-1, keepdim=True) / ctx.qmax
        slope = slope.masked_fill(scale <= MIN_SCALE, 0.0)
        if ctx.symmetric:
            top = x.abs().argmax(-1, keepdim=True)
            return grad.scatter_add(-1, top, (slope * x.gather(-1, top).sign()).to(grad)), None, None
        high, top = x.max(-1, keepdim=True)
        low, bottom = x.min(-1, keepdim=True)
        out = grad.scatter_add(-1, top, slope.masked_fill(high <= 0, 0.0).to(grad))
        return out.scatter_add(-1, bottom, -slope.masked_fill(low >= 0, 0.0).to(grad)), None, None


def quantize_tokens(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Fake-quantize activations ``[..., K]`` per token, dynamically (min-max)."""
    return _FakeQuantizeTokens.apply(x, bits, symmetric)


class WeightQuantizer(nn.Module):
    """Grid of one weight ``[N, K]``; sub-classes say which part of it is learned.

    The grid is *relative* to the minimum and maximum of each group of the weight that :meth:`forward` is given, so it
    keeps its meaning while equivalent transforms rescale that weight. Groups run along K; a short last group is padded
    with zeros, which never widen a range (it always holds 0). ``layout`` says how the weight is stored.
    """

    def __init__(self, weight: Tensor, params: OmniQuantParams, layout: AffineLayout) -> None:
        super().__init__()
        self.rows, self.columns = weight.shape
        if (layout.out_features, layout.in_features) != (self.rows, self.columns):
            raise ConfigError(f"the layout {layout} is not that of a weight [{self.rows}, {self.columns}]")
        self.layout = layout
        self.bits, self.sym, self.scale_dtype = layout.bits, layout.symmetric, layout.scale_dtype
        self.size = self.columns if layout.per_channel else min(layout.group_size, self.columns)
        self.groups = -(-self.columns // self.size)
        self.zero_grad_through = params.zero_grad
        self._fixed: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def qmax(self) -> int:
        return int(2**self.bits - 1)

    def fix(self, weight: Tensor) -> None:
        """Remember the groups and ranges of a weight that no transform will change (saves reading it at each step)."""
        with torch.no_grad():
            grouped = self._grouped(weight)
            self._fixed = (grouped, *_range(grouped))

    def _grouped(self, weight: Tensor) -> Tensor:
        padding = self.groups * self.size - self.columns
        padded = F.pad(weight, (0, padding)) if padding else weight
        return padded.view(self.rows, self.groups, self.size)

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self._store(low, high)

    def _step(self, low: Tensor, high: Tensor) -> Tensor:
        if self.sym:
            return torch.maximum(high, -low) / (2 ** (self.bits - 1) - 1)
        return (high - low) / self.qmax

    def _store(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale as stored and integer zero point of the range [low, high]."""
        scale = round_through(self._step(low, high).clamp(MIN_SCALE, MAX_SCALE), self.scale_dtype)
        if self.sym:
            return scale, torch.full_like(scale, 2 ** (self.bits - 1))
        zero = -low / scale
        zero = round_through(zero) if self.zero_grad_through else zero.detach().round()
        return scale, zero.clamp(0, self.qmax)

    def _offset(self) -> Tensor | None:
        return None

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantized ``[N, K]`` of a float32 ``weight`` ``[N, K]``."""
        grouped, low, high = self._fixed or (g := self._grouped(weight), *_range(g))
        scale, zero = self._grid(low, high)
        out = fake_quantize(grouped, scale, zero, self.qmax, self._offset())
        return out.reshape(self.rows, -1)[:, : self.columns]

    @torch.no_grad()
    def export(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes uint8 ``[N, K]``, scales 16-bit ``[N, G]`` and zero points uint8 ``[N, G]`` (None if symmetric)."""
        grouped, low, high = self._fixed or (g := self._grouped(weight), *_range(g))
        scale, zero = self._grid(low, high)
        ratio, offset = grouped / scale, self._offset()
        codes = ((ratio if offset is None else ratio + offset).round() + zero).clamp(0, self.qmax)
        codes = codes.reshape(self.rows, -1)[:, : self.columns].to(torch.uint8).contiguous()
        zeros = None if self.sym else zero.squeeze(-1).to(torch.uint8)
        return codes, scale.squeeze(-1).to(self.scale_dtype), zeros

    def clamp_(self) -> None:
        """Bring learned values back into their bounds (after each optimizer step)."""

    def groups_of_parameters(self, params: OmniQuantParams) -> list[tuple[list[nn.Parameter], float]]:
        """Learned parameters with their learning rates."""
        return []


class ClippingQuantizer(WeightQuantizer):
    """The paper's learnable weight clipping (section 3.2, equation 2): ``[sigmoid(b) min, sigmoid(g) max]``."""

    def __init__(self, weight: Tensor, params: OmniQuantParams, layout: AffineLayout) -> None:
        super().__init__(weight, params, layout)
        shape = (self.rows, self.groups, 1)
        self.upper = nn.Parameter(torch.full(shape, LWC_INIT, device=weight.device))
        self.lower = nn.Parameter(torch.full(shape, LWC_INIT, device=weight.device))

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self._store(low * torch.sigmoid(self.lower), high * torch.sigmoid(self.upper))

    def groups_of_parameters(self, params: OmniQuantParams) -> list[tuple[list[nn.Parameter], float]]:
        return [([self.upper, self.lower], params.lwc_lr)]


class RoundingQuantizer(WeightQuantizer):
    """Learned rounding: an offset in [-range, range] steps for every weight, and (with ``lwc``) the grid itself.

    The grid is learned as ``scale = minmax scale * exp(a)`` and ``zero = round(minmax zero + b)``, clamped to the
    codes: a scale can neither change sign nor reach zero.
    """

    def __init__(self, weight: Tensor, params: OmniQuantParams, layout: AffineLayout) -> None:
        super().__init__(weight, params, layout)
        self.range = params.rounding_range
        self.offset = nn.Parameter(torch.zeros(self.rows, self.groups, self.size, device=weight.device))
        self.learns_grid = params.lwc
        shape = (self.rows, self.groups, 1)
        self.log_scale = nn.Parameter(torch.zeros(shape, device=weight.device), requires_grad=self.learns_grid)
        self.zero_offset = nn.Parameter(torch.zeros(shape, device=weight.device), requires_grad=self.learns_grid)

    def _offset(self) -> Tensor:
        return self.offset

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        step = self._step(low, high).clamp(min=MIN_SCALE)
        scale = (step * self.log_scale.exp()).clamp(MIN_SCALE, MAX_SCALE)
        scale = round_through(scale, self.scale_dtype)
        if self.sym:
            return scale, torch.full_like(scale, 2 ** (self.bits - 1))
        return scale, round_through(-low / step + self.zero_offset).clamp(0, self.qmax)

    def clamp_(self) -> None:
        with torch.no_grad():
            self.offset.clamp_(-self.range, self.range)

    def groups_of_parameters(self, params: OmniQuantParams) -> list[tuple[list[nn.Parameter], float]]:
        learned: list[tuple[list[nn.Parameter], float]] = [([self.offset], params.rounding_lr)]
        if self.learns_grid:
            learned.append(([self.log_scale, self.zero_offset], params.lwc_lr))
        return learned


def make_quantizer(weight: Tensor, params: OmniQuantParams, layout: AffineLayout | None = None) -> WeightQuantizer:
    """The quantizer that ``params`` ask for: learned rounding, the paper's clipping, or plain rounding to nearest.

    layout: how the weight ``[N, K]`` is stored, where that is not what ``params`` say.
    """
    kind = RoundingQuantizer if params.rounding else ClippingQuantizer if params.lwc else WeightQuantizer
    return kind(weight, params, layout or params.layout(*weight.shape))


def _range(grouped: Tensor) -> tuple[Tensor, Tensor]:
    # not aminmax: torch 2.10 and 2.11 have no derivative of it
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    return low.clamp(max=0), high.clamp(min=0)
