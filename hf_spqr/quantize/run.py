"""The walk through a model's blocks that every method shares: one block on the device, activations on the host."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_spqr.calibration.blocks import Block, Call, Recording, replay
from hf_spqr.config import PackedConfig
from hf_spqr.errors import HfSpqrError, NonFiniteError
from hf_spqr.quantize.experts import (
    ExpertsTarget,
    Inputs,
    Quantize,
    quantize_experts,
    record_inputs,
    survey_experts,
)
from hf_spqr.quantize.ranks import Ranks
from hf_spqr.quantize.targets import Target
from hf_spqr.report import LayerReport, QuantizationReport

__all__ = ["Run", "named"]

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=PackedConfig)
PLAIN_BITS = 16
"""Bits of a weight that is not quantized."""


@dataclass
class Run(Generic[ConfigT]):
    """What a run works on. A method subclasses it and implements :meth:`quantize`."""

    model: nn.Module
    config: ConfigT
    blocks: list[Block]
    targets: list[Target]
    experts: list[ExpertsTarget]
    recording: Recording
    report: QuantizationReport
    bar: tqdm
    device: torch.device | str | None
    ranks: Ranks

    method: ClassVar[str]
    """What the report calls it."""
    divides_data: ClassVar[bool]
    """Whether each rank has a part of the calibration batches; else all have all of them."""

    def quantize(self) -> None:
        """Replace the layers of all targets by packed ones and add a layer report for each."""
        raise NotImplementedError

    def targets_of(self, index: int) -> dict[str, Target]:
        """The targets in block ``index`` by their names inside the block."""
        return {target.local_name: target for target in self.targets if target.block == index}

    @contextmanager
    def on_device(self, block: Block) -> Iterator[None]:
        """The block on the device of the run for a while, then back where it was."""
        home = next(block.module.parameters()).device
        try:
            block.module.to(self.device if self.device is not None else home)
            yield
        finally:
            block.module.to(home)

    @torch.no_grad()
    def outputs(self, block: Block, hidden: list[Tensor], calls: list[Call]) -> list[Tensor]:
        """Outputs of ``block`` on the host; they replace its inputs in ``hidden``. Raises NonFiniteError naming it."""
        with self.ranks.together():
            for position, call in enumerate(calls):
                output = replay(block.module, hidden[position], call).to("cpu")
                if not bool(torch.isfinite(output).all()):
                    raise NonFiniteError(
                        f"The output of {block.name} contains NaN or infinity on the calibration data. A float16 model"
                        " that overflows should be quantized in bfloat16 or float32 (dtype=)."
                    )
                hidden[position] = output
        return hidden

    def quantize_experts(
        self, index: int, hidden: list[Tensor], quantize: Quantize, *, true_sequential: bool = False
    ) -> dict[str, nn.Module]:
        """Packed experts of block ``index`` by local name; the layers before them give them their inputs.

        Until the modules are put in place, the original ones hold the dequantized weights.
        """
        mine = {target.local_name: target for target in self.experts if target.block == index}
        if not mine:
            return {}
        inputs = self._experts_inputs(index, mine, hidden)
        packed: dict[str, nn.Module] = {}
        for name, target in mine.items():
            self.show(target.name)
            started = time.perf_counter()
            with named(target.name):
                packed[name], results = quantize_experts(
                    target, inputs.pop(name), quantize, self.ranks, true_sequential=true_sequential
                )
            seconds = (time.perf_counter() - started) / len(results)
            for result in results:
                result.linear.backend = self.config.backend
                self.report.notes.extend(result.notes())
                self.done(result.report(self.method, seconds))
        return packed

    def survey_experts(self, index: int, hidden: list[Tensor]) -> Iterator[tuple[str, Sequence[Tensor], Tensor]]:
        """(name, matrices [N, K] of all experts, one Hessian [K, K]) of the projections in block ``index``."""
        mine = {target.local_name: target for target in self.experts if target.block == index}
        if not mine:
            return
        inputs = self._experts_inputs(index, mine, hidden)
        for name, target in mine.items():
            yield from survey_experts(target, inputs.pop(name))

    def _experts_inputs(
        self, index: int, mine: Mapping[str, ExpertsTarget], hidden: Sequence[Tensor]
    ) -> dict[str, Inputs]:
        """What the experts modules of block ``index`` are given on all the calibration data, by local name."""
        modules = {name: target.module for name, target in mine.items()}
        with self.ranks.together():
            inputs = record_inputs(self.blocks[index].module, modules, hidden, self.recording.calls[index])
        if self.divides_data:
            for found in inputs.values():
                found.tokens, found.experts = self.ranks.join(found.tokens), self.ranks.join(found.experts)
        return inputs

    def put(self, block: Block, packed: Mapping[str, nn.Module]) -> None:
        """Put packed modules in the place of layers of ``block``, and free the weights of those."""
        for local_name, module in packed.items():
            old = block.module.get_submodule(local_name)
            block.module.set_submodule(local_name, module)
            kept = {id(parameter) for parameter in module.parameters()}
            for parameter in old.parameters(recurse=False):
                if id(parameter) not in kept:
                    parameter.data = parameter.data.new_empty(0)

    def show(self, text: str, layers: int = 0) -> None:
        """Say beside the bar what is being done; ``layers``: the work of how many is done, beside finished ones."""
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(max(len(self.report.layers) + layers - self.bar.n, 0))

    def done(self, layer: LayerReport) -> None:
        """Note a finished layer, with a warning where it would have been smaller in bfloat16."""
        self.report.layers.append(layer)
        if layer.bits_per_weight > PLAIN_BITS:
            note = f"{layer.name}: {layer.bits_per_weight:.1f} bits per weight, more than the {PLAIN_BITS} of bfloat16"
            if self.config.layout(*layer.shape, layer.name).fixed_bytes * 8 <= PLAIN_BITS * math.prod(layer.shape):
                note += (
                    f": {layer.outlier_share:.0%} of its weights are outliers. Raise outlier_threshold, or set a lower"
                    " target_bits."
                )
            else:
                note += ", for it is narrow. modules_to_not_convert leaves it as it is."
            self.report.notes.append(note)
            if self.ranks.first:
                logger.warning(note)
        error = "" if layer.error is None else f" error {layer.error:.4f},"
        self.show(f"{layer.name}{error} {layer.bits_per_weight:.3f} bits")


class named(AbstractContextManager[None]):
    """Puts the name of a layer in front of the message of our own exceptions."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, HfSpqrError) and not str(error).startswith(self.name):
            raise type(error)(f"{self.name}: {error}") from error
