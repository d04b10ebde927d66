"""SpQR over a whole model: a Hessian for every input of a block, then its layers one by one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_spqr.calibration.blocks import Block
from hf_spqr.config import SpQRConfig
from hf_spqr.formats.spqr import SpQRWeight
from hf_spqr.methods import spqr
from hf_spqr.methods.base import LayerResult
from hf_spqr.nn import SpQRLinear, dense
from hf_spqr.quantize.budget import Budget, survey_layer
from hf_spqr.quantize.capture import gather_hessians, hessian_or_identity, shared_inputs
from hf_spqr.quantize.pages import let_go, span
from hf_spqr.quantize.run import Run, named
from hf_spqr.quantize.targets import Target
from hf_spqr.report import LayerReport

__all__ = ["SpQRRun"]


@dataclass
class SpQRRun(Run[SpQRConfig]):
    """Every block sees the inputs that the quantized blocks before it give."""

    method = "spqr"
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
            self.report.notes.append(self.budget.summary(self.report.bits_per_weight))

    def _survey(self, target_bits: float) -> Budget:
        """A pass through the model as it is that only counts outliers for every threshold."""
        budget, hidden = Budget(target_bits), list(self.recording.hidden)
        for index, block in enumerate(self.blocks):
            mine, calls = self.targets_of(index), self.recording.calls[index]
            with self.on_device(block):
                layers = {name: target.linear for name, target in mine.items()}
                groups = shared_inputs(block.module, layers, hidden[0], calls[0]) if mine else []
                sums = gather_hessians(block.module, {g[0]: layers[g[0]] for g in groups}, hidden, calls)
                for group in groups:
                    with named(mine[group[0]].name):
                        hessian = hessian_or_identity(sums.pop(group[0]))
                    for name in group:
                        self._count(budget, mine[name].name, [dense.matrix(layers[name])], hessian)
                for name, weights, hessian in self.survey_experts(index, hidden):
                    self._count(budget, name, weights, hessian)
                if index + 1 < len(self.blocks):
                    hidden = self.outputs(block, hidden, calls)
        budget.start()
        return budget

    def _count(self, budget: Budget, name: str, weights: Sequence[Tensor], hessian: Tensor) -> None:
        self.show(f"{name}: counting outliers")
        params = self.config.params(name)
        own = params.outlier_threshold != self.config.outlier_threshold
        with named(name):
            budget.add(survey_layer(name, weights, hessian, params, fixed=own))

    def done(self, layer: LayerReport) -> None:
        if self.budget is not None:
            self.budget.spend(layer.name, layer.outliers, layer.nbytes)
        super().done(layer)

    def _quantize_block(self, block: Block, mine: dict[str, Target], hidden: list[Tensor]) -> dict[str, nn.Module]:
        """Packed modules by local name. Until they are put in place, the layers hold their dequantized weights."""
        calls = self.recording.calls[next(iter(mine.values())).block]
        layers = {name: target.linear for name, target in mine.items()}
        groups = shared_inputs(block.module, layers, hidden[0], calls[0])
        sequential = self.config.true_sequential
        packed: dict[str, nn.Module] = {}
        for step in [[group] for group in groups] if sequential else [groups]:
            leaders = {group[0]: layers[group[0]] for group in step}
            sums = gather_hessians(block.module, leaders, hidden, calls, stop_early=sequential)
            for group in step:
                if not sums[group[0]].tokens:
                    names = ", ".join(mine[name].name for name in group)
                    self.report.notes.append(f"{names}: no calibration token came here; quantized without data.")
                with named(mine[group[0]].name):
                    hessian = hessian_or_identity(sums.pop(group[0]))
                for name in group:
                    packed[name] = self._quantize_layer(mine[name], hessian)
        return packed

    def _quantize_projection(self, name: str, weight: Tensor, hessian: Tensor) -> LayerResult:
        params = self.config.params(name)
        if self.budget is not None:
            params = replace(params, outlier_threshold=self.budget.threshold(name))
        return spqr.quantize(weight, hessian, params)

    @torch.no_grad()
    def _quantize_layer(self, target: Target, hessian: Tensor) -> nn.Module:
        self.show(target.name)
        started = time.perf_counter()
        linear, params = target.linear, self.config.params(target.name)
        if self.budget is not None:
            params = replace(params, outlier_threshold=self.budget.threshold(target.name))
        with named(target.name):
            result = spqr.quantize(dense.matrix(linear), hessian, params)
        assert isinstance(result.weight, SpQRWeight)
        dtype = dense.matrix(linear).dtype
        bias: Any = None if linear.bias is None else linear.bias.detach()  # type: ignore[operator]
        module = SpQRLinear.from_weight(result.weight, bias, dtype)
        module.backend = self.config.backend
        module.replaces = dense.kind(linear)
        dense.set_matrix(linear, result.weight.dequantize(dtype))
        if result.damping_raised:
            self.report.notes.append(
                f"{target.name}: the Hessian was not positive definite, damping was raised to {result.percdamp:g}."
            )
        self.done(
            LayerReport(
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
        )
        return module
