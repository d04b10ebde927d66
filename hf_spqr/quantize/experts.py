"""Mixture-of-experts layers: each expert is quantized with the Hessian of the tokens that the router sends to it.

The inputs of an experts module are kept in host memory, with the routing, and one expert is worked on at a time, so
that one Hessian at a time is on the device. An expert that saw fewer tokens than it has inputs has a singular Hessian
that says little about what it will see in use: what is missing to that number is filled with tokens of the whole
layer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_spqr.calibration.blocks import Block, Call, replay
from hf_spqr.calibration.hessian import HessianAccumulator
from hf_spqr.config import PackedConfig
from hf_spqr.errors import MISFITS, CalibrationError
from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineWeight
from hf_spqr.formats.spqr import SpQRLayout, SpQRWeight
from hf_spqr.methods.base import LayerResult, energy_ratio, output_energy
from hf_spqr.nn.experts import ExpertsKind, PackedExperts, activate, describe, pack_experts
from hf_spqr.nn.grouped import AffineGroupedLinear, GroupedLinear, SpQRGroupedLinear
from hf_spqr.quantize.ranks import Ranks
from hf_spqr.quantize.targets import kept_in_float32, shared_parameters
from hf_spqr.report import LayerReport

__all__ = [
    "ExpertsTarget",
    "Inputs",
    "ProjectionResult",
    "find_experts",
    "quantize_experts",
    "record_inputs",
    "survey_experts",
]

FILL_TOKENS = 4096
"""At most this many tokens of the whole layer stand in for the tokens that an expert did not see."""

Quantize = Callable[[str, Tensor, Tensor], LayerResult]
"""(name of the projection, weight [N, K], Hessian [K, K]) -> quantized weight."""


@dataclass(frozen=True)
class ExpertsTarget:
    """An experts module to quantize: its full name, its name inside its block, the index of the block."""

    name: str
    local_name: str
    block: int
    module: nn.Module
    kind: ExpertsKind

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) by full name, as overrides and reports call them."""
        return {f"{self.name}.{projection}": shape for projection, shape in self.kind.projections.items()}


@dataclass
class ProjectionResult:
    """One projection of all experts.

    name           full name, ``<experts module>.gate_proj``
    linear         the packed matrices
    error          relative output error over all experts, each with its own Hessian
    undersampled   experts that saw fewer tokens than ``in_features``
    unseen         those of them that saw none
    """

    name: str
    linear: GroupedLinear
    error: float
    undersampled: int
    unseen: int
    damping_raised: int

    def report(self, method: str, seconds: float) -> LayerReport:
        """The entry of the quantization report."""
        layout = self.linear.layout
        return LayerReport(
            name=self.name,
            shape=(self.linear.experts * layout.out_features, layout.in_features),
            method=method,
            bits=layout.bits,
            group_size=layout.group_size,
            nbytes=self.linear.nbytes(),
            outliers=self.linear.outliers(),
            error=self.error,
            seconds=seconds,
            experts=self.linear.experts,
            undersampled=self.undersampled,
        )

    def notes(self) -> list[str]:
        """What the report should say in words."""
        notes = []
        if self.undersampled:
            none = f" ({self.unseen} of them none)" if self.unseen else ""
            notes.append(
                f"{self.name}: {self.undersampled} of {self.linear.experts} experts saw fewer than"
                f" {self.linear.in_features} tokens{none}; tokens of the whole layer stood in for the rest."
            )
        if self.damping_raised:
            notes.append(f"{self.name}: the damping was raised for {self.damping_raised} experts.")
        return notes


@dataclass
class Inputs:
    """What an experts module was given: per batch the tokens [T, hidden] and the experts of each, [T, k]."""

    tokens: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)

    def of(self, expert: int) -> Tensor:
        """The tokens that were sent to ``expert``, [T_e, hidden]."""
        return torch.cat([t[(e == expert).any(-1)] for t, e in zip(self.tokens, self.experts, strict=True)])

    def sample(self, most: int) -> Tensor:
        """At most about ``most`` of all tokens, evenly spread."""
        step = max(1, math.ceil(sum(len(tokens) for tokens in self.tokens) / most))
        return torch.cat(self.tokens)[::step] if step > 1 else torch.cat(self.tokens)


def find_experts(model: nn.Module, blocks: Sequence[Block], config: PackedConfig) -> list[ExpertsTarget]:
    """The experts modules inside ``blocks`` that ``config`` does not exclude and that packing makes smaller.

    A module is left alone as a whole where the config excludes one of its projections, and where it computes something
    else than packed experts do.
    """
    keep, shared = kept_in_float32(model), shared_parameters(model)
    found = []
    for index, block in enumerate(blocks):
        for local_name, module in block.module.named_modules():
            kind = describe(module)
            name = block.inside(local_name)
            if kind is None or f"{name}.down_proj" in shared or any(part in keep for part in name.split(".")):
                continue
            target = ExpertsTarget(name, local_name, index, module, kind)
            if any(config.excludes(projection) for projection in target.projections):
                continue
            layouts = [config.layout(*shape, projection) for projection, shape in target.projections.items()]
            full = sum(kind.view(module, projection)[0].nbytes for projection in kind.projections)
            smaller = sum(layout.fixed_bytes for layout in layouts) < full
            if smaller and _computes_as_packed(module, kind):
                found.append(target)
    return found


@torch.no_grad()
def _computes_as_packed(module: Any, kind: ExpertsKind) -> bool:
    """Whether the first expert gives for a token what :class:`PackedExperts` would, without rounding.

    A model's own code may have parameters of the known names and shapes, and another order of rows or another gate.
    """
    weight = getattr(module, kind.fused)
    if weight.is_meta:  # cannot be tried
        return True
    token = torch.linspace(-1, 1, kind.hidden, dtype=weight.dtype, device=weight.device)[None]
    forward = inspect.unwrap(type(module).forward)  # not another implementation of it, for certain devices and dtypes
    try:
        expected = _inner(module, kind, 0, token) @ kind.view(module, "down_proj")[0].T
        if kind.biased:
            expected = expected + module.down_proj_bias[0]
        if getattr(module, "has_post_expert_norm", False):
            expected = module.post_expert_norm(expected)
        if len(inspect.signature(forward).parameters) == 2:  # itself and rows sorted by expert
            got = forward(module, nn.functional.pad(token, (0, 0, 0, kind.experts - 1)))[:1]
        else:
            index = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
            got = forward(module, token, index, torch.ones_like(token[:, :1]))
        close = (got.reshape(expected.shape) - expected).norm() <= 0.05 * expected.norm() + 1e-6
    except MISFITS:  # it is called in another way, or has another gate
        return False
    return bool(close | ~expected.isfinite().all())


@torch.no_grad()
def record_inputs(
    block: nn.Module, experts: Mapping[str, nn.Module], hidden: Sequence[Tensor], calls: Sequence[Call]
) -> dict[str, Inputs]:
    """Run the block on every batch and keep, in host memory, what its experts modules are given, by name."""
    inputs = {name: Inputs() for name in experts}
    with ExitStack() as hooks:
        for name, module in experts.items():

            def keep(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                kind = describe(module)
                assert kind is not None
                tokens, index = args[0].reshape(-1, kind.hidden), args[1] if len(args) > 1 else None
                if index is None:  # rows sorted by expert, zero where a token is not for the expert
                    index = torch.arange(kind.experts).repeat_interleave(len(tokens) // kind.experts)[:, None]
                    chosen = (tokens != 0).any(-1).cpu()
                    tokens, index = tokens.cpu()[chosen], index[chosen]
                inputs[name].tokens.append(tokens.cpu())
                inputs[name].experts.append(index.cpu())

            hooks.callback(module.register_forward_pre_hook(keep).remove)
        for states, call in zip(hidden, calls, strict=True):
            replay(block, states, call)
    return inputs


@torch.no_grad()
def quantize_experts(
    target: ExpertsTarget, inputs: Inputs, quantize: Quantize, ranks: Ranks, *, true_sequential: bool = False
) -> tuple[PackedExperts, list[ProjectionResult]]:
    """Quantize all experts of ``target``, each rank some of them; its module is left with the dequantized weights.

    ``inputs`` are those of all ranks. ``true_sequential``: the inputs of ``down_proj`` are those that the quantized
    projections before it give.

    Raises:
        CalibrationError: no token at all has reached the module.
        NonFiniteError: NaN or infinity in a weight or an activation.
    """
    module, kind = target.module, target.kind
    device = next(module.parameters()).device
    if not sum(len(tokens) for tokens in inputs.tokens):
        raise CalibrationError(f"{target.name}: no calibration token has reached these experts.")
    fill = inputs.sample(FILL_TOKENS).to(device)
    mine: dict[int, dict[str, _Matrix]] = {}
    with ranks.together():
        fill_moments = _moments(fill, kind.hidden)
        for expert in range(ranks.rank, kind.experts, ranks.size):
            mine[expert] = _quantize_expert(
                target, expert, inputs.of(expert).to(device), fill, fill_moments, quantize, true_sequential
            )
    every = ranks.exchange(mine)
    for expert in every.keys() - mine.keys():
        for name, matrix in every[expert].items():
            weight = kind.view(module, name)[expert]
            weight.copy_(matrix.unpack().dequantize(weight.dtype))
    results = {
        name: _result(f"{target.name}.{name}", [every[expert][name] for expert in range(kind.experts)])
        for name in kind.projections
    }
    for result in results.values():
        result.linear.to(device)
    return pack_experts(module, {name: result.linear for name, result in results.items()}), list(results.values())


@torch.no_grad()
def survey_experts(target: ExpertsTarget, inputs: Inputs) -> Iterator[tuple[str, list[Tensor], Tensor]]:
    """(full name, matrices [N, K] of all experts, one Hessian [K, K]) of each projection of ``target``.

    The Hessian is that of tokens of the whole layer, for ``down_proj`` as the first expert transforms them: enough to
    compare the weights of the experts with each other.
    """
    module, kind = target.module, target.kind
    fill = inputs.sample(FILL_TOKENS).to(next(module.parameters()).device)
    for projection in kind.projections:
        last = projection == "down_proj"
        x, width = (_inner(module, kind, 0, fill), kind.intermediate) if last else (fill, kind.hidden)
        name = f"{target.name}.{projection}"
        yield name, list(kind.view(module, projection)), _moments(x, width).hessian()


@dataclass
class _Matrix:
    """One projection of one expert: its packed tensors in host memory and what the report sums up."""

    layout: Any
    tensors: dict[str, Tensor]
    energy: float
    error: float
    tokens: int
    damping_raised: bool

    def unpack(self) -> SpQRWeight | AffineWeight:
        if isinstance(self.layout, SpQRLayout):
            return spqr.unpack(self.layout, self.tensors)
        return affine.unpack(self.layout, self.tensors)


def _quantize_expert(
    target: ExpertsTarget,
    expert: int,
    tokens: Tensor,
    fill: Tensor,
    fill_moments: HessianAccumulator,
    quantize: Quantize,
    true_sequential: bool,
) -> dict[str, _Matrix]:
    """The projections of one expert for its ``tokens``; its weights are overwritten with the dequantized ones."""
    module, kind = target.module, target.kind
    found: dict[str, _Matrix] = {}

    def add(name: str, hessian: Tensor) -> None:
        weight = kind.view(module, name)[expert]
        found[name] = _quantize_matrix(f"{target.name}.{name}", weight, hessian, len(tokens), quantize)

    first = list(kind.projections)[:-1]
    hessian = _completed(_moments(tokens, kind.hidden), fill_moments)
    if true_sequential:
        for name in first:
            add(name, hessian)
    inner = _moments(_inner(module, kind, expert, tokens), kind.intermediate)
    inner_fill = None
    if len(tokens) < kind.intermediate:
        inner_fill = _moments(_inner(module, kind, expert, fill), kind.intermediate)
    if not true_sequential:
        for name in first:
            add(name, hessian)
    add("down_proj", _completed(inner, inner_fill))
    return found


def _quantize_matrix(name: str, weight: Tensor, hessian: Tensor, tokens: int, quantize: Quantize) -> _Matrix:
    """Quantize ``weight`` [N, K], a view that is overwritten with the dequantized matrix."""
    energy = max(tokens, 1) * output_energy(weight.float(), hessian)
    result = quantize(name, weight.contiguous(), hessian)
    weight.copy_(result.weight.dequantize(weight.dtype))
    packed = spqr.pack(result.weight) if isinstance(result.weight, SpQRWeight) else affine.pack(result.weight)
    tensors = {key: tensor.cpu() for key, tensor in packed.items()}
    return _Matrix(result.weight.layout, tensors, energy, result.error, tokens, result.damping_raised)


def _result(name: str, experts: Sequence[_Matrix]) -> ProjectionResult:
    """The same projection of all experts."""
    layout = experts[0].layout
    kind = SpQRGroupedLinear if isinstance(layout, SpQRLayout) else AffineGroupedLinear
    spent = total = 0.0
    for matrix in experts:
        spent += matrix.error**2 * matrix.energy
        total += matrix.energy
    return ProjectionResult(
        name=name,
        linear=kind.join(layout, [matrix.tensors for matrix in experts]),
        error=energy_ratio(spent, total),
        undersampled=sum(matrix.tokens < layout.in_features for matrix in experts),
        unseen=sum(not matrix.tokens for matrix in experts),
        damping_raised=sum(matrix.damping_raised for matrix in experts),
    )


def _moments(x: Tensor, width: int) -> HessianAccumulator:
    moments = HessianAccumulator(width, x.device)
    moments.add(x)
    return moments


def _completed(own: HessianAccumulator, fill: HessianAccumulator | None) -> Tensor:
    """The Hessian of ``own`` tokens, completed with the mean of ``fill`` to as many tokens as there are inputs."""
    missing = own.in_features - own.tokens
    if missing <= 0 or fill is None:
        return own.hessian()
    hessian = fill.hessian() * (missing / own.in_features)
    return hessian + own.hessian() * (own.tokens / own.in_features) if own.tokens else hessian


def _inner(module: nn.Module, kind: ExpertsKind, expert: int, tokens: Tensor) -> Tensor:
    """What ``down_proj`` of one expert is given for tokens [T, hidden]: [T, intermediate]."""
    weight = getattr(module, kind.fused)[expert]
    y = tokens @ (weight if kind.transposed else weight.T)
    if kind.biased:
        y = y + getattr(module, f"{kind.fused}_bias")[expert]
    return activate(module, kind, y)
