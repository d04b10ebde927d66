"""Mixture-of-experts modules with packed weights, made from any module that keeps its experts in 3-D tensors.

Transformers keeps the experts of a layer as ``gate_up_proj`` and ``down_proj`` of one module (``up_proj`` where there
is no gate), [E, out, in] or transposed, gate and up rows one after the other or in turns, with or without biases.
:func:`describe` reads which from the module itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_spqr.nn.grouped import GroupedLinear

__all__ = ["ExpertsKind", "PackedExperts", "by_expert", "describe", "pack_experts"]


@dataclass(frozen=True)
class ExpertsKind:
    """How an experts module stores its weights.

    gated         ``gate_up_proj`` instead of ``up_proj``
    transposed    [E, in, out] instead of [E, out, in]
    interleaved   gate and up rows in turns instead of all gate rows first
    biased        ``gate_up_proj_bias`` or ``up_proj_bias`` [E, out], and ``down_proj_bias``
    """

    experts: int
    hidden: int
    intermediate: int
    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool

    @property
    def fused(self) -> str:
        """Name of the first parameter of the original module."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The matrices of one expert: (out_features, in_features) by name."""
        first = ("gate_proj", "up_proj") if self.gated else ("up_proj",)
        return {name: (self.intermediate, self.hidden) for name in first} | {
            "down_proj": (self.hidden, self.intermediate)
        }

    def view(self, module: nn.Module, projection: str) -> Tensor:
        """The weights of one projection in an original module, [E, out_features, in_features], sharing its memory."""
        weight: Tensor = getattr(module, "down_proj" if projection == "down_proj" else self.fused)
        weight = weight.detach()
        if self.transposed:
            weight = weight.transpose(1, 2)
        if projection == "down_proj" or not self.gated:
            return weight
        if self.interleaved:
            return weight[:, int(projection == "up_proj") :: 2]
        return weight.chunk(2, dim=1)[int(projection == "up_proj")]


def describe(module: nn.Module) -> ExpertsKind | None:
    """How ``module`` stores experts; None where it is no experts module, or one of an unknown shape."""
    parameters = dict(module.named_parameters(recurse=False))
    gated = "gate_up_proj" in parameters
    first, down = parameters.get("gate_up_proj" if gated else "up_proj"), parameters.get("down_proj")
    if first is None or down is None or first.dim() != 3 or down.dim() != 3 or first.shape[0] != down.shape[0]:
        return None
    a, b = first.shape[1:]
    c, d = down.shape[1:]
    ratio = 2 if gated else 1
    if (a, b) == (ratio * d, c) and not getattr(module, "is_transposed", False):
        transposed, hidden, intermediate = False, c, d
    elif (a, b) == (d, ratio * c):
        transposed, hidden, intermediate = True, d, c
    else:
        return None
    biased = "down_proj_bias" in parameters
    expected = {"gate_up_proj" if gated else "up_proj", "down_proj"}
    if biased:
        expected |= {f"{name}_bias" for name in expected}
    if set(parameters) != expected:
        return None
    return ExpertsKind(
        experts=first.shape[0],
        hidden=hidden,
        intermediate=intermediate,
        gated=gated,
        transposed=transposed,
        interleaved=not getattr(module, "is_concatenated", True),
        biased=biased,
    )


class PackedExperts(nn.Module):
    """An experts module whose matrices are packed; its other traits (activation, gate, biases) are the original's.

    The class of an instance derives from this one and from the class of the module that it replaces. ``packed`` holds
    one :class:`GroupedLinear` for each projection. ``gate_up_proj`` and ``down_proj`` stay as empty float parameters:
    they answer questions for dtype and device, and a load without this package fails on their shape.
    """

    kind: ExpertsKind
    down_proj: Tensor
    post_expert_norm: nn.Module
    original_class: type[nn.Module]
    packed: nn.ModuleDict
    held: tuple[int, int] | None = None
    """The first expert that this rank holds under tensor parallelism and the one after the last; None for all."""
    group: Any = None
    """The process group that holds all of them together."""

    def hold(self, first: int, last: int, group: Any = None) -> None:
        """Hold some of the experts only: others give zeros. On the meta device, before the tensors are loaded."""
        self.held, self.group = (first, last), group
        for linear in self.linears().values():
            for name in linear.packed_tensors():
                old = linear.get_parameter(name)
                if name not in linear.ragged:
                    setattr(linear, name, nn.Parameter(old.detach()[first:last], requires_grad=False))

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """hidden_states [T, hidden] with the experts top_k_index [T, k] of each token and their weights [T, k].

        An index that is no expert's (E and above, as Transformers marks experts of other ranks, or negative, as vLLM
        does) adds nothing.
        Without an index: hidden_states [E * T, hidden], T rows for each expert, of which zero rows are not computed.
        Returns the sum over the experts of a token, [T, hidden], or [E * T, hidden].
        """
        if top_k_index is None:
            rows = hidden_states.reshape(-1, self.kind.hidden)
            owner = torch.arange(self.kind.experts, device=rows.device)
            owner = owner.repeat_interleave(rows.shape[0] // self.kind.experts)
            if not self.kind.biased:
                owner = owner.masked_fill((rows == 0).all(-1), self.kind.experts)
            return self._experts(rows, owner)
        top_k = top_k_index.shape[-1]
        y = self._experts(hidden_states.repeat_interleave(top_k, 0), top_k_index.reshape(-1))
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        assert top_k_weights is not None
        y = y * top_k_weights.reshape(-1, 1)
        return y.view(-1, top_k, self.kind.hidden).sum(1).to(hidden_states.dtype)

    def _experts(self, x: Tensor, expert: Tensor) -> Tensor:
        """Row i of x [S, hidden] through expert ``expert[i]``; rows of experts that are not held give zeros."""
        first, last = self.held or (0, self.kind.experts)
        expert = (expert - first).masked_fill((expert < first) | (expert >= last), last - first)
        order, ends = by_expert(expert, last - first)
        expert, x = expert[order], x[order]
        y = self._join_gate([self.packed[name](x, ends) for name in list(self.kind.projections)[:-1]])
        nobody, expert = (expert >= last - first)[:, None], expert + first
        if self.kind.biased:
            y = y + self._biases(self.kind.fused, expert, y.dtype)
        y = self._activate(y)
        y = self.packed["down_proj"](y, ends)
        if self.kind.biased:
            y = (y + self._biases("down_proj", expert, y.dtype)).masked_fill(nobody, 0)
        return torch.empty_like(y).index_copy(0, order, y)

    def _join_gate(self, parts: list[Tensor]) -> Tensor:
        """The outputs of the first projections in the order of the original module."""
        if self.kind.interleaved:
            return torch.stack(parts, -1).flatten(-2)
        return torch.cat(parts, -1)

    def _biases(self, name: str, expert: Tensor, dtype: torch.dtype) -> Tensor:
        return getattr(self, f"{name}_bias")[expert.clamp(max=self.kind.experts - 1)].to(dtype)

    def _activate(self, y: Tensor) -> Tensor:
        return activate(self, self.kind, y)

    def linears(self) -> dict[str, GroupedLinear]:
        """The packed projections by name."""
        return dict(self.packed.items())  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise CheckpointError unless the indices and zero points in the packed tensors are sound."""
        for linear in self.linears().values():
            linear.check()

    def to_experts(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The original module with dequantized weights."""
        dtype = dtype or self.down_proj.dtype
        weights = {name: linear.dequantize_weight(dtype) for name, linear in self.linears().items()}
        first = self._join_rows([weights[name] for name in list(weights)[:-1]])
        module = _with_class(self, self.original_class)
        del module._modules["packed"]
        for name, weight in ((self.kind.fused, first), ("down_proj", weights["down_proj"])):
            weight = weight.transpose(1, 2).contiguous() if self.kind.transposed else weight
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
        for name, bias in list(module.named_parameters(recurse=False)):
            if name.endswith("_bias"):
                setattr(module, name, nn.Parameter(bias.detach().to(dtype), requires_grad=False))
        return module

    def _join_rows(self, parts: list[Tensor]) -> Tensor:
        if self.kind.interleaved:
            return torch.stack(parts, 2).flatten(1, 2)
        return torch.cat(parts, 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (self.original_class,), self.__dict__


def by_expert(expert: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The order [S] in which rows are sorted by ``expert`` [S], and where the rows of each of ``experts`` end, [E].

    Rows of nobody have the number E.
    """
    order = expert.argsort(stable=True)
    return order, torch.searchsorted(expert[order], torch.arange(experts, device=expert.device), right=True)


def activate(module: nn.Module, kind: ExpertsKind, y: Tensor) -> Tensor:
    """What an expert does between its projections; y [S, 2 * intermediate] or [S, intermediate] -> [S, intermediate].

    ``y`` is in the order of the original ``gate_up_proj``, biases included.
    """
    if not kind.gated:
        return module.act_fn(y)  # type: ignore[operator]
    gate: Any = getattr(module, "_apply_gate", None)
    if gate is not None:
        return gate(y)
    first, up = y.chunk(2, dim=-1)
    return up * module.act_fn(first)  # type: ignore[operator]


def pack_experts(module: nn.Module, packed: Mapping[str, GroupedLinear]) -> PackedExperts:
    """``module`` with ``packed`` (by projection) instead of its weights; everything else is shared with it."""
    kind = describe(module)
    assert kind is not None and set(packed) == set(kind.projections)
    new = _with_class(module, packed_class(type(module)))  # type: ignore[arg-type]  # classes are hashable
    assert isinstance(new, PackedExperts)
    new.kind = kind
    for name in (kind.fused, "down_proj"):
        old = getattr(module, name)
        setattr(new, name, nn.Parameter(old.detach().new_empty(0), requires_grad=False))
    new.packed = nn.ModuleDict(dict(packed))
    return new


@cache
def packed_class(original: type[nn.Module]) -> type[PackedExperts]:
    """The class that replaces ``original``."""
    return type(f"Packed{original.__name__}", (PackedExperts, original), {"original_class": original})


def _new(original: type[nn.Module]) -> PackedExperts:
    kind = packed_class(original)  # type: ignore[arg-type]
    return kind.__new__(kind)


def _with_class(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A shallow copy of ``module`` of another class, with dictionaries of parameters and submodules of its own."""
    new = kind.__new__(kind)
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = dict(module.__dict__[name])
    return new
