"""The metric in which OmniQuant measures the errors of a block's output.

Some of the calibration samples go through the model as it is, forwards and then backwards, a block at a time on the
device. So many go together that what they leave behind in all blocks is about as large as the inputs of one block for
all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_spqr.calibration.blocks import replay
from hf_spqr.calibration.fisher import FisherSum, gradient_at_the_end, through_block
from hf_spqr.errors import MISFITS, UnsupportedLayerError
from hf_spqr.methods.omniquant.runner import BlockRunner
from hf_spqr.quantize.calls import keywords, sequences_first
from hf_spqr.quantize.run import Run

__all__ = ["output_metrics"]

TOKENS = 32768
"""Enough to tell directions apart: of these, or of all there are, the gradients are taken."""


def output_metrics(run: Run[Any], states: Tensor, sequence_dim: int) -> dict[int, Tensor]:
    """The Fisher information at the output of each block, float32 [H, H] in host memory with a mean of 1 on the
    diagonal, by the block's number.

    states: inputs of the first block [S, T, ..., H]; ``sequence_dim``: where the blocks have what is first in it. A
    block that the model's output does not depend on has none. None has any where the output is no logits or gives no
    gradient; the report says so.
    """
    gradients, reasons = _Gradients(run, states, sequence_dim), []
    enough = range(min(len(states), -(-TOKENS // states[0, ..., 0].numel())))
    samples = enough[run.ranks.rank :: run.ranks.size]
    at_once = max(1, len(states) // len(run.blocks))
    with run.ranks.together():
        try:
            gradients.at_the_end(0, states[:1])  # what may not work is tried first
            for start in range(0, len(samples), at_once):
                run.show(f"Fisher information, sequence {start + 1}/{len(samples)}")
                gradients.add(samples[start : start + at_once])
        except torch.OutOfMemoryError:
            raise
        except (*MISFITS, UnsupportedLayerError) as error:
            reasons = [str(error).partition("\n")[0] or type(error).__name__]
    if reasons := run.ranks.join(reasons):
        run.report.notes.append(f"Blocks are learned by plain squared errors, without fisher: {reasons[0]}.")
        return {}
    found = {}
    for index, sums in enumerate(gradients.sums):
        sums.moments, sums.tokens = run.ranks.add(sums.moments), run.ranks.add(sums.tokens)
        if (fisher := sums.information()) is not None:
            found[index] = fisher
    return found


class _Gradients:
    """Sums over the gradients at the output of each block of ``run``."""

    def __init__(self, run: Run[Any], states: Tensor, sequence_dim: int) -> None:
        self.run, self.states, self.sequence_dim = run, states, sequence_dim
        self.sums = [FisherSum(states.shape[-1]) for _ in run.blocks]

    def at_the_end(self, sample: int, hidden: Tensor) -> Tensor:
        """The gradient with respect to the output ``hidden [1, T, ..., H]`` of the last block for ``sample``."""
        run, dim = self.run, self.sequence_dim
        ids, seed = run.recording.batches[sample], run.config.seed + sample
        return gradient_at_the_end(run.model, run.blocks, ids, hidden.movedim(0, dim), seed).movedim(dim, 0)

    def add(self, samples: Sequence[int]) -> None:
        """Add what ``samples`` give."""
        run, calls = self.run, self.run.recording.calls
        outputs = [[self.states[i : i + 1] for i in samples]]
        for index, block in enumerate(run.blocks):
            with run.on_device(block), sequences_first(block.module, self.sequence_dim), torch.no_grad():
                pairs = zip(samples, outputs[-1], strict=True)
                outputs.append([replay(block.module, hidden, calls[index][i]).cpu() for i, hidden in pairs])
        gradients = [self.at_the_end(i, hidden) for i, hidden in zip(samples, outputs.pop(), strict=True)]
        for index, block in reversed(list(enumerate(run.blocks))):
            inputs = outputs.pop()
            with run.on_device(block), sequences_first(block.module, self.sequence_dim):
                arguments = [keywords(block.module, calls[index][i]) for i in samples]
                runner = BlockRunner(block.module, arguments, [])
                for i, gradient in enumerate(gradients):
                    gradient = gradient.to(runner.device, torch.float32)
                    self.sums[index].add(gradient)
                    if index:
                        call = partial(runner, samples=[i])
                        gradients[i] = through_block(call, inputs[i].to(runner.device), gradient).cpu()
