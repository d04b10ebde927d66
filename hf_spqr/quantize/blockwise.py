"""OmniQuant over a whole model: two chains of activations, full precision and quantized, a block learned at a time.

Of several ranks each has all of the calibration data; they divide the samples of every training step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_spqr.calibration.blocks import Block
from hf_spqr.config import OmniQuantConfig
from hf_spqr.errors import CalibrationError, HfSpqrError, RankError
from hf_spqr.methods import gptq
from hf_spqr.methods.base import AffineParams, LayerResult
from hf_spqr.methods.omniquant import BlockResult, quantize_block
from hf_spqr.methods.omniquant.runner import BlockRunner
from hf_spqr.methods.omniquant.team import Team
from hf_spqr.nn import AffineGroupedLinear, AffineLinear, dense
from hf_spqr.quantize.calls import keywords, sequences_first
from hf_spqr.quantize.metric import output_metrics
from hf_spqr.quantize.run import Run, named
from hf_spqr.quantize.targets import Target
from hf_spqr.report import BlockReport, LayerReport

__all__ = ["OmniQuantRun"]


@dataclass
class OmniQuantRun(Run[OmniQuantConfig]):
    """Every block learns to give, on the outputs of the quantized blocks before it, what the original gives."""

    method = "omniquant"
    divides_data = False  # a step draws its samples from all of them

    sequence_dim: int = field(default=0, init=False)
    """The dimension of the hidden states that counts sequences; what is learned from has it first."""

    def quantize(self) -> None:
        full = quantized = self._samples()
        params = self.config.params()
        metrics = output_metrics(self, full, self.sequence_dim) if params.fisher and params.epochs else {}
        for index, block in enumerate(self.blocks):
            mine = self.targets_of(index)
            with self.on_device(block), sequences_first(block.module, self.sequence_dim):
                calls = [keywords(block.module, call) for call in self.recording.calls[index]]
                inputs = quantized
                if mine:
                    started = time.perf_counter()
                    result = self._learn(block, mine, full, quantized, calls, metrics.pop(index, None))
                    self._store(block, mine, result, time.perf_counter() - started)
                    full, quantized = result.outputs_fp, result.outputs_q
                else:
                    full, quantized = (self._outputs(index, states) for states in (full, quantized))
                experts = self.quantize_experts(index, list(inputs.split(1)), self._quantize_projection)
                if experts:
                    self._put_experts(block, experts)
                    quantized = self._outputs(index, inputs)
            self.recording.calls[index] = []

    def _outputs(self, index: int, states: Tensor) -> Tensor:
        return torch.cat(self.outputs(self.blocks[index], list(states.split(1)), self.recording.calls[index]))

    def _quantize_projection(self, name: str, weight: Tensor, hessian: Tensor) -> LayerResult:
        """Experts are not learned: each sees too few of the tokens. They get the same grid by GPTQ."""
        return gptq.quantize(weight, hessian, AffineParams.of(self.config.layout(*weight.shape, name)))

    def _put_experts(self, block: Block, experts: dict[str, nn.Module]) -> None:
        self.put(block, experts)
        for module in experts.values():
            for linear in module.modules():
                if isinstance(linear, AffineGroupedLinear):
                    linear.act_bits, linear.act_sym = self.config.act_bits, self.config.act_sym

    def _samples(self) -> Tensor:
        """Inputs of the first block [samples, tokens, ..., hidden]: the sequences of full length."""
        lengths = [states.numel() for states in self.recording.hidden]
        keep = [i for i, length in enumerate(lengths) if length == max(lengths)]
        if len(keep) < len(lengths):
            self.report.notes.append(
                f"{len(lengths) - len(keep)} calibration sequences shorter than the others were not used."
            )
        shape = self.recording.hidden[keep[0]].shape
        if 1 not in shape:
            raise CalibrationError(f"OmniQuant needs one sequence per recorded batch, the blocks get {list(shape)}.")
        self.sequence_dim = shape.index(1)
        self.recording.calls = [[calls[i] for i in keep] for calls in self.recording.calls]
        self.recording.batches = [self.recording.batches[i] for i in keep]
        return torch.cat([self.recording.hidden[i].movedim(self.sequence_dim, 0) for i in keep])

    def _learn(
        self,
        block: Block,
        mine: dict[str, Target],
        full: Tensor,
        quantized: Tensor,
        calls: list[dict[str, Any]],
        metric: Tensor | None,
    ) -> BlockResult:
        linears = {name: target.linear for name, target in mine.items()}
        layouts = {name: self.config.layout(*dense.features(t.linear), t.name) for name, t in mine.items()}
        params = self.config.params()
        if params.batch_size > 1 and not BlockRunner(block.module, calls[:2], []).batches(full[:2]):
            params = replace(params, batch_size=1)
            self.report.notes.append(f"{block.name}: its samples cannot be run together, batch_size is 1.")

        def progress(step: int, steps: int, loss: float, best: float) -> None:
            text = f"{block.name} step {step}/{steps} loss {loss:.3g} best {best:.3g}"
            self.show(text, len(mine) * step // steps)

        team = Team(self.ranks.rank, self.ranks.size, self.ranks.add)
        try:
            with named(block.name), torch.enable_grad():  # the caller may be under no_grad
                return quantize_block(
                    block.module, full, quantized, calls, params, linears, layouts=layouts, metric=metric,
                    progress=progress, team=team,
                )  # fmt: skip
        except HfSpqrError as error:  # every rank judges the same samples and numbers
            error.everywhere = team.size > 1 and not isinstance(error, RankError)
            raise

    @torch.no_grad()
    def _store(self, block: Block, mine: dict[str, Target], result: BlockResult, seconds: float) -> None:
        """Put the packed layers and the folded parameters in place and report them."""
        for name, value in result.folded.items():
            owner, _, leaf = name.rpartition(".")
            setattr(block.module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        for name, weight in result.weights.items():
            linear = block.module.get_submodule(name)
            old, bias = dense.matrix(linear), getattr(linear, "bias", None)
            module = AffineLinear.from_weight(weight, None if bias is None else bias.detach(), old.dtype).to(
                old.device
            )
            module.replaces = dense.kind(linear)
            module.backend = self.config.backend
            module.act_bits, module.act_sym = self.config.act_bits, self.config.act_sym
            block.module.set_submodule(name, module)
            self.done(
                LayerReport(
                    name=mine[name].name,
                    shape=(module.out_features, module.in_features),
                    method=self.method,
                    bits=module.layout.bits,
                    group_size=module.layout.group_size,
                    nbytes=module.nbytes(),
                    seconds=seconds / len(result.weights),
                )
            )
        learned = BlockReport(
            name=block.name,
            nearest=result.loss_nearest if math.isfinite(result.loss_nearest) else None,
            initial=result.loss_initial,
            final=result.loss_final,
            steps=len(result.losses),
            skipped=result.skipped,
            kept_initial=result.kept_initial,
            transforms=result.pairs,
        )
        self.report.blocks.append(learned)
        self.report.notes.append(learned.describe())
