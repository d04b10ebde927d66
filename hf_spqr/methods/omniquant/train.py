"""Quantize one decoder block: learn grids, rounding and equivalent transforms against the block's own output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_spqr.errors import CalibrationError, NonFiniteError
from hf_spqr.formats.affine import AffineLayout, AffineWeight

from .pairs import EquivalencePair
from .params import OmniQuantParams
from .propose import find_pairs
from .quantizers import make_quantizer
from .result import BlockResult
from .runner import BlockRunner, Kwargs
from .shorten import short_call
from .team import Team
from .transforms import ChannelStatistics, Transforms, consumer_modules, start_scales

Progress = Callable[[int, int, float, float], None]
"""Told the step, the number of steps, the loss of the step, and the lowest loss so far on the judged samples."""


class Student(nn.Module):
    """The learned state of a block: transforms first, then fake-quantized weights."""

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        pairs: Sequence[EquivalencePair],
        params: OmniQuantParams,
        layouts: Mapping[str, AffineLayout],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.names = list(linears)
        self._turned = {name for name, module in linears.items() if not isinstance(module, nn.Linear)}
        self.transforms = Transforms(pairs, device, params.let_log, shift=params.act_bits is not None)
        made = [make_quantizer(self.matrix(name, tensors), params, layouts.get(name)) for name in self.names]
        self.quantizers = nn.ModuleList(made)
        self.params, self._layer = params, dict(zip(self.names, made, strict=True))
        moving = {site.param for pair in pairs for site in pair.scales}
        for name, quantizer in self._layer.items():
            if f"{name}.weight" not in moving:
                quantizer.fix(self.matrix(name, tensors))

    def matrix(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight of a layer as [out_features, in_features]."""
        weight = tensors[f"{name}.weight"]
        return weight.T if name in self._turned else weight

    def forward(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's tensors that change, weights fake-quantized."""
        changed = self.transforms(tensors)
        for name, quantizer in self._layer.items():
            quantized = quantizer(self.matrix(name, {**tensors, **changed}))
            changed[f"{name}.weight"] = quantized.T if name in self._turned else quantized
        return changed

    def learned(self) -> list[dict[str, Any]]:
        """Optimizer groups."""
        groups = [group for quantizer in self._layer.values() for group in quantizer.groups_of_parameters(self.params)]
        if self.transforms.pairs:
            groups.append((list(self.transforms.parameters()), self.params.let_lr))
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameters, rate in groups:
            by_rate.setdefault(rate, []).extend(parameters)
        return [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]

    def clamp_(self) -> None:
        for quantizer in self._layer.values():
            quantizer.clamp_()

    @torch.no_grad()
    def store(
        self, block: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, AffineWeight], dict[str, Tensor]]:
        """Packed-format weights, and the other changed parameters in the dtype that the block holds them in."""
        changed = self.transforms(tensors)
        weights = {}
        for name, quantizer in self._layer.items():
            codes, scales, zeros = quantizer.export(self.matrix(name, {**tensors, **changed}))
            changed.pop(f"{name}.weight", None)
            weights[name] = AffineWeight(quantizer.layout, codes, scales, zeros)
        return weights, {name: value.to(block.get_parameter(name).dtype) for name, value in changed.items()}


def quantize_block(
    block: nn.Module,
    inputs_fp: Tensor,
    inputs_q: Tensor,
    kwargs: Kwargs | Sequence[Kwargs],
    params: OmniQuantParams,
    linears: Mapping[str, nn.Module],
    *,
    layouts: Mapping[str, AffineLayout] | None = None,
    metric: Tensor | None = None,
    probe: tuple[Tensor, Kwargs] | None = None,
    pairs: Sequence[EquivalencePair] | None = None,
    progress: Progress | None = None,
    team: Team | None = None,
) -> BlockResult:
    """Quantize ``linears`` (by their names inside ``block``) to the packed affine format (paper, algorithm 1).

    A layer that is not an ``nn.Linear`` holds its weight as ``[in_features, out_features]`` (GPT-2's Conv1D).

    inputs_fp, inputs_q: hidden states ``[S, T, H]`` (``[S, T, streams, H]`` with several residual streams)
    that enter the block in the full-precision and in the quantized chain, any float dtype, host or device. kwargs:
    keyword arguments that the block itself receives, one mapping for all samples or one for each. layouts: how single
    layers are stored, by name; the others as ``params`` say. metric: ``[H, H]``, symmetric and positive semidefinite
    with a mean of 1 on its diagonal: an error d of the output costs ``d^T metric d / H``, as the Fisher information at
    the block's output has it; None (or ``params.fisher`` off) for ``d^T d / H``. probe: a short recorded call
    ``(hidden [B, T, H], kwargs)`` on which equivalent transforms are verified (default: the first tokens of the first
    sample). pairs: verified transforms, to skip the search. progress: see :data:`Progress`. team: the processes that
    call this together, with the same arguments; they divide the samples of each step, and all get the result.

    The block is left as it was. Parameters other than the linears' weights that transforms change are returned, not
    written.

    Raises:
        CalibrationError: shapes of the two streams differ, there are no samples, or the metric is not ``[H, H]``.
        ConfigError: a layout is not that of its layer.
        NonFiniteError: the block's full-precision output, or its output before training, is not finite.
    """
    if inputs_fp.shape != inputs_q.shape or inputs_fp.dim() < 3 or not len(inputs_fp):
        raise CalibrationError(
            f"expected two streams [samples, tokens, ..., hidden] of one shape, got {tuple(inputs_fp.shape)}"
            f" and {tuple(inputs_q.shape)}"
        )
    width = inputs_fp.shape[-1]
    if metric is not None and metric.shape != (width, width):
        raise CalibrationError(f"expected a metric [{width}, {width}], got {list(metric.shape)}")
    job = _Job(block, inputs_fp, inputs_q, kwargs, params, linears, layouts or {}, metric, team or Team())
    return job.run(probe, pairs, progress)


class _Job:
    """One call of :func:`quantize_block`."""

    def __init__(
        self,
        block: nn.Module,
        inputs_fp: Tensor,
        inputs_q: Tensor,
        kwargs: Kwargs | Sequence[Kwargs],
        params: OmniQuantParams,
        linears: Mapping[str, nn.Module],
        layouts: Mapping[str, AffineLayout],
        metric: Tensor | None,
        team: Team,
    ) -> None:
        self.block, self.params, self.linears, self.layouts, self.team = block, params, linears, layouts, team
        self.inputs_fp, self.inputs_q, self.kwargs = inputs_fp, inputs_q, kwargs
        self.runner = BlockRunner(block, kwargs, list(linears), params.autocast)
        self.metric = None if metric is None or not params.fisher else metric.to(self.runner.device, torch.float32)
        self.generator = torch.Generator().manual_seed(params.seed)
        order = torch.randperm(len(inputs_q), generator=self.generator).tolist()
        kept_out = round(len(order) * params.holdout) if len(order) > 1 else 0
        if params.holdout > 0 and len(order) > 1:
            kept_out = max(kept_out, 1)
        self.judged = sorted(order[:kept_out]) or sorted(order)
        self.trained = sorted(order[kept_out:])
        self.keeps_best = kept_out > 0

    def run(
        self, probe: tuple[Tensor, Kwargs] | None, pairs: Sequence[EquivalencePair] | None, progress: Progress | None
    ) -> BlockResult:
        params, runner = self.params, self.runner
        rejected: list[str] = []
        if not params.transforms:
            pairs = []
        elif pairs is None:
            hidden, arguments = probe or short_call(runner, self.inputs_fp[:1].to(runner.device))
            pairs, rejected = find_pairs(self.block, hidden, arguments, seed=params.seed)
        pairs = [pair for pair in pairs if pair.kind in params.let_pairs]
        statistics = ChannelStatistics()
        with runner.observe(consumer_modules(pairs), statistics.see):
            self.outputs_fp = self._stream(self.inputs_fp)
        if not bool(torch.isfinite(self.outputs_fp).all()):
            raise NonFiniteError("the block's full-precision output has NaN or infinity: check checkpoint and dtype")
        self.target_same = self._stream(self.inputs_q) if params.aug_loss else None

        plain = replace(params, rounding=False, lwc=False)
        nearest = self._judge(Student(self.linears, runner.tensors, [], plain, self.layouts, runner.device))
        student = Student(self.linears, runner.tensors, pairs, params, self.layouts, runner.device)
        if pairs:
            self._start(student, statistics)
        initial = self._judge(student)
        if not math.isfinite(initial):
            raise NonFiniteError(f"the block's quantized output is not finite before training (loss {initial})")
        stored_initial = student.store(self.block, runner.tensors)
        loss_initial = self._judge_stored(*stored_initial)

        losses, skipped = self._train(student, initial, progress)
        stored = student.store(self.block, runner.tensors)
        loss_final = self._judge_stored(*stored)
        kept_initial = not loss_final <= loss_initial
        if kept_initial:
            stored, loss_final = stored_initial, loss_initial
        weights, folded = stored
        outputs_q = self._stream(self.inputs_q, self._tensors(*stored), quantized=True)
        return BlockResult(
            weights, folded, [pair.name for pair in pairs], rejected, nearest, loss_initial, loss_final, kept_initial,
            skipped, self.outputs_fp, outputs_q, losses,
        )  # fmt: skip

    def _call(self, hidden: Tensor, samples: Sequence[int], tensors: Mapping[str, Tensor]) -> Tensor:
        params = self.params
        attention = params.act_bits if params.quantize_attention else None
        return self.runner(hidden, samples, tensors, params.act_bits, attention, params.act_sym)

    @torch.no_grad()
    def _stream(self, inputs: Tensor, tensors: Mapping[str, Tensor] | None = None, quantized: bool = False) -> Tensor:
        out = torch.empty_like(inputs)
        for start in range(0, len(inputs), self.params.batch_size):
            samples = list(range(start, min(start + self.params.batch_size, len(inputs))))
            hidden = inputs[samples]
            result = self._call(hidden, samples, tensors or {}) if quantized else self.runner(hidden, samples)
            out[samples] = result.to(out)
        return out

    def _loss(self, tensors: Mapping[str, Tensor], samples: Sequence[int], augmented: bool) -> Tensor:
        index = torch.tensor(samples, device=self.inputs_q.device)
        out = self._call(self.inputs_q[index], samples, tensors)
        loss = self._distance(out, self.outputs_fp[index])
        if augmented and self.target_same is not None:
            loss = loss + self._distance(out, self.target_same[index])
        return loss

    def _distance(self, out: Tensor, target: Tensor) -> Tensor:
        if self.metric is None:
            return F.mse_loss(out, target.to(out))
        error = out - target.to(out)
        return (error @ self.metric * error).mean()

    @torch.no_grad()
    def _judge_tensors(self, tensors: Mapping[str, Tensor]) -> float:
        total, size = 0.0, self.params.batch_size
        for start in self.team.mine(range(0, len(self.judged), size)):
            samples = self.judged[start : start + size]
            total += float(self._loss(tensors, samples, augmented=False)) * len(samples)
        return self.team.sum(total) / len(self.judged)

    @torch.no_grad()
    def _judge(self, student: Student) -> float:
        return self._judge_tensors(student(self.runner.tensors))

    def _judge_stored(self, weights: Mapping[str, AffineWeight], folded: Mapping[str, Tensor]) -> float:
        return self._judge_tensors(self._tensors(weights, folded))

    def _tensors(self, weights: Mapping[str, AffineWeight], folded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the packed block computes with."""
        dense = {
            f"{name}.weight": weight.dequantize()
            if isinstance(self.linears[name], nn.Linear)
            else weight.dequantize().T
            for name, weight in weights.items()
        }
        return {**dense, **{name: value.float() for name, value in folded.items()}}

    def _start(self, student: Student, statistics: ChannelStatistics) -> None:
        """Start the transforms at the migration strength with the lowest block error."""
        scores = {}
        for alpha in self.params.let_alpha:
            start_scales(student.transforms, self.runner.tensors, statistics, alpha)
            scores[alpha] = self._judge(student) if len(self.params.let_alpha) > 1 else 0.0
        best = min(scores, key=lambda alpha: scores[alpha] if math.isfinite(scores[alpha]) else math.inf)
        start_scales(student.transforms, self.runner.tensors, statistics, best)

    def _batches(self) -> list[list[int]]:
        params = self.params
        found: list[list[int]] = []
        for _ in range(params.epochs):
            order = torch.randperm(len(self.trained), generator=self.generator).tolist()
            samples = [self.trained[i] for i in order] if params.shuffle else self.trained
            found.extend(samples[i : i + params.batch_size] for i in range(0, len(samples), params.batch_size))
        return found

    def _train(self, student: Student, initial: float, progress: Progress | None) -> tuple[list[float], int]:
        """Learn; leaves the best judged state (or the last, without kept-out samples) in ``student``."""
        params, groups, batches = self.params, student.learned(), self._batches()
        if not groups or not batches:
            return [], 0
        optimizer = torch.optim.Adam(groups, foreach=True)
        learned = [parameter for group in groups for parameter in group["params"]]
        rates = [group["lr"] for group in groups]
        best, best_state = initial, _copy(student)
        losses: list[float] = []
        skipped, every = 0, max(1, len(batches) // max(1, min(params.epochs, 10)))
        for step, samples in enumerate(batches, 1):
            if params.cosine:
                decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - 1) / len(batches)))
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * decay
            optimizer.zero_grad(set_to_none=True)
            mine, value = self.team.mine(samples), 0.0
            if mine:
                loss = self._loss(student(self.runner.tensors), mine, augmented=True) * (len(mine) / len(samples))
                loss.backward()
                value = float(loss.detach())
            self.team.sum_gradients(learned)
            value = self.team.sum(value)
            grads = [parameter.grad for parameter in learned if parameter.grad is not None]
            if math.isfinite(value) and math.isfinite(float(torch.nn.utils.get_total_norm(grads))):
                optimizer.step()
                student.clamp_()
            else:
                skipped += 1
            losses.append(value)
            if self.keeps_best and (step % every == 0 or step == len(batches)):
                score = self._judge(student)
                if score < best:
                    best, best_state = score, _copy(student)
            if progress is not None:
                progress(step, len(batches), value, best if self.keeps_best else min(losses))
        if self.keeps_best:
            student.load_state_dict(best_state)
        return losses, skipped


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
