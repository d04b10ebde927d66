"""SpQR over a whole model: a Hessian for every input of a block, then its layers one by one.

Of several ranks each runs its calibration batches through the block; the sums are joined, and every layer is quantized
by one of them. The result is that of one process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_spqr.calibration.blocks import Block
from hf_spqr.config import SpQRConfig
from hf_spqr.errors import ConfigError
from hf_spqr.formats import spqr as packing
from hf_spqr.formats.spqr import SpQRWeight
from hf_spqr.methods import spqr
from hf_spqr.methods.base import LayerResult
from hf_spqr.nn import SpQRLinear, dense
from hf_spqr.quantize.budget import Budget, LayerScores, survey_layer
from hf_spqr.quantize.capture import gather_hessians, hessian_or_identity, shared_inputs
from hf_spqr.quantize.pages import let_go, span
from hf_spqr.quantize.run import Run, named
from hf_spqr.quantize.targets import Target
from hf_spqr.report import LayerReport

__all__ = ["SpQRRun"]


@dataclass
class _Layer:
    """A quantized layer: the packed module, in host memory where others get it, its report, and notes in words."""

    module: SpQRLinear
    report: LayerReport
    notes: list[str]


@dataclass
class SpQRRun(Run[SpQRConfig]):
    """Every block sees the inputs that the quantized blocks before it give."""

    method = "spqr"
    divides_data = True
    budget: Budget | None = field(default=None, init=False)

    def quantize(self) -> None:
        if self.config.target_bits is not None:
            self.budget = self._survey(self.config.target_bits)
        hidden, self.recording.hidden = self.recording.hidden, []
        for index, block in enumerate(self.blocks):
            mine, calls = self.targets_of(index), self.recording.calls[index]
            originals = [span(target.linear.get_parameter("weight")) for target in mine.values()]
            with self.on_device(block):
                packed = self._quantize_block(block, mine, hidden) if mine else {}
                self._choose_thresholds(index)
                packed |= self.quantize_experts(
                    index, hidden, self._quantize_projection, true_sequential=self.config.true_sequential
                )
                if index + 1 < len(self.blocks):
                    hidden = self.outputs(block, hidden, calls)
                self.put(block, packed)
            let_go(originals)
            self.recording.calls[index] = []
        if self.budget is not None:
            self.config.outlier_threshold = self.budget.chosen()
            codes = f"bits={self.config.bits}, group_size={self.config.group_size}"
            self.report.notes.append(self.budget.summary(codes, self.report.bits_per_weight))

    def _check_size(self, block: Block, mine: Mapping[str, Target]) -> None:
        """Raise ConfigError where the layers of the first block are larger than before: so would be all others."""
        if len(self.report.layers) > len(mine):
            return
        before = sum(dense.matrix(target.linear).nbytes for target in mine.values())
        if self.report.nbytes > before:
            threshold = min(self.config.params(target.name).outlier_threshold for target in mine.values())
            raise ConfigError(
                f"outlier_threshold={threshold:g} makes the layers of {block.name} larger than"
                f" they were: {self.report.bits_per_weight:.1f} bits per weight instead of"
                f" {8 * before / self.report.weights:.0f}. Raise it (0.2 keeps about 1 % of the weights as outliers),"
                " or set target_bits."
            )

    def _survey(self, target_bits: float) -> Budget:
        """A pass through the model as it is that only counts outliers for every threshold."""
        budget, hidden = Budget(target_bits), list(self.recording.hidden)
        for index, block in enumerate(self.blocks):
            mine, calls = self.targets_of(index), self.recording.calls[index]
            with self.on_device(block):
                if mine:
                    layers = {name: target.linear for name, target in mine.items()}
                    groups = self._groups(block, layers, hidden, index)
                    hessians = self._hessians(block, mine, groups, hidden, self._owners(mine))
                    jobs = [(mine[n].name, [dense.matrix(layers[n])], hessians.get(n)) for g in groups for n in g]
                    self._count(budget, jobs)
                self._count(budget, self._divided(self.survey_experts(index, hidden)))
                if index + 1 < len(self.blocks):
                    hidden = self.outputs(block, hidden, calls)
        with self.ranks.together():
            budget.start()
        return budget

    def _count(self, budget: Budget, jobs: Sequence[tuple[str, Sequence[Tensor], Tensor | None]]) -> None:
        """Score layers (name, matrices, Hessian); those without Hessian are scored by another rank."""
        scores: dict[str, LayerScores] = {}
        with self.ranks.together():
            for name, weights, hessian in jobs:
                if hessian is None:
                    continue
                self.show(f"{name}: counting outliers")
                params = self.config.params(name)
                own = self.config.has_own_threshold(name)
                with named(name):
                    scores[name] = survey_layer(name, weights, hessian, params, fixed=own)
        scores = self.ranks.exchange(scores)
        for name, _, _ in jobs:
            budget.add(scores[name])

    def _divided(
        self, jobs: Iterable[tuple[str, Sequence[Tensor], Tensor]]
    ) -> list[tuple[str, Sequence[Tensor], Tensor | None]]:
        """``jobs`` with the Hessian only in those of this rank, which take turns."""
        size, rank = self.ranks.size, self.ranks.rank
        return [(name, w, h if i % size == rank else None) for i, (name, w, h) in enumerate(jobs)]

    def _choose_thresholds(self, index: int) -> None:
        """Ask for the thresholds of the experts of block ``index`` on every rank, also where it quantizes none."""
        if self.budget is not None:
            for target in self.experts:
                for name in target.projections if target.block == index else ():
                    self.budget.threshold(name)

    def done(self, layer: LayerReport) -> None:
        if self.budget is not None:
            self.budget.spend(layer.name, layer.outliers, layer.nbytes)
        super().done(layer)

    def _quantize_block(self, block: Block, mine: dict[str, Target], hidden: list[Tensor]) -> dict[str, nn.Module]:
        """Packed modules by local name. Until they are put in place, the layers hold their dequantized weights."""
        layers = {name: target.linear for name, target in mine.items()}
        owners = self._owners(mine)
        groups = self._groups(block, layers, hidden, next(iter(mine.values())).block)
        packed: dict[str, nn.Module] = {}
        for step in [[group] for group in groups] if self.config.true_sequential else [groups]:
            hessians = self._hessians(block, mine, step, hidden, owners, stop_early=self.config.true_sequential)
            names = [name for group in step for name in group]
            # with a budget, the threshold of a layer depends on what the layers before it took
            for few in [[name] for name in names] if self.budget is not None else [names]:
                done: dict[str, _Layer] = {}
                with self.ranks.together():
                    for name in few:
                        threshold = None if self.budget is None else self.budget.threshold(mine[name].name)
                        if owners[name] == self.ranks.rank:
                            done[name] = self._quantize_layer(mine[name], hessians.pop(name), threshold)
                for name, layer in self.ranks.exchange(done).items():
                    if name not in done:
                        _adopt(layers[name], layer.module)
                    done[name] = layer
                for name in few:
                    packed[name] = done[name].module.to(dense.matrix(layers[name]).device)
                    self.report.notes.extend(done[name].notes)
                    self.done(done[name].report)
        with self.ranks.together():
            self._check_size(block, mine)
        return packed

    def _owners(self, mine: Mapping[str, Target]) -> dict[str, int]:
        """Which rank quantizes which layer: factoring its Hessian and spreading its errors are what costs."""
        shapes = {name: dense.features(target.linear) for name, target in mine.items()}
        return self.ranks.owners({name: k * k * (n + k) for name, (n, k) in shapes.items()})

    def _groups(
        self, block: Block, layers: Mapping[str, nn.Module], hidden: Sequence[Tensor], index: int
    ) -> list[list[str]]:
        """Which layers share an input, as the first batch of all shows."""
        call = self.recording.calls[index][0]
        return self.ranks.from_first(lambda: shared_inputs(block.module, layers, hidden[0], call))

    def _hessians(
        self,
        block: Block,
        mine: Mapping[str, Target],
        groups: Sequence[Sequence[str]],
        hidden: Sequence[Tensor],
        owners: Mapping[str, int],
        *,
        stop_early: bool = False,
    ) -> dict[str, Tensor]:
        """The Hessians of the layers that this rank owns, over the batches of all ranks."""
        calls = self.recording.calls[mine[groups[0][0]].block]
        leaders = {group[0]: mine[group[0]].linear for group in groups}
        with self.ranks.together(), named(block.name):
            sums = gather_hessians(block.module, leaders, hidden, calls, stop_early=stop_early)
        hessians: dict[str, Tensor] = {}
        for group in groups:
            moments = sums.pop(group[0])
            self.ranks.add_moments(moments, {owners[name] for name in group})
            if not moments.tokens:
                names = ", ".join(mine[name].name for name in group)
                self.report.notes.append(f"{names}: no calibration token came here; quantized without data.")
            own = [name for name in group if owners[name] == self.ranks.rank]
            if own:
                with named(mine[group[0]].name):
                    hessians |= dict.fromkeys(own, hessian_or_identity(moments))
        return hessians

    def _quantize_projection(self, name: str, weight: Tensor, hessian: Tensor) -> LayerResult:
        params = self.config.params(name)
        if self.budget is not None:
            params = replace(params, outlier_threshold=self.budget.threshold(name))
        return spqr.quantize(weight, hessian, params)

    @torch.no_grad()
    def _quantize_layer(self, target: Target, hessian: Tensor, threshold: float | None) -> _Layer:
        self.show(target.name)
        started = time.perf_counter()
        linear, params = target.linear, self.config.params(target.name)
        if threshold is not None:
            params = replace(params, outlier_threshold=threshold)
        with named(target.name):
            result = spqr.quantize(dense.matrix(linear), hessian, params)
        assert isinstance(result.weight, SpQRWeight)
        dtype = dense.matrix(linear).dtype
        bias: Any = None if linear.bias is None else linear.bias.detach()  # type: ignore[operator]
        module = SpQRLinear.from_weight(result.weight, bias, dtype)
        module.backend = self.config.backend
        module.replaces = dense.kind(linear)
        dense.set_matrix(linear, result.weight.dequantize(dtype))
        notes = []
        if result.damping_raised:
            notes.append(
                f"{target.name}: the Hessian was not positive definite, damping was raised to {result.percdamp:g}."
            )
        report = LayerReport(
            name=target.name,
            shape=(module.out_features, module.in_features),
            method=self.method,
            bits=module.layout.bits,
            group_size=module.layout.group_size,
            nbytes=module.nbytes(),
            outliers=module.outliers(),
            error=result.error,
            seconds=time.perf_counter() - started,
        )
        return _Layer(module if self.ranks.size == 1 else module.cpu(), report, notes)


def _adopt(linear: nn.Module, module: SpQRLinear) -> None:
    """Give ``linear`` the dequantized weights of ``module``, which another rank has made of it."""
    old = dense.matrix(linear)
    weight = packing.unpack(module.layout, module.packed_tensors()).dequantize(old.dtype)
    dense.set_matrix(linear, weight.to(old.device))
