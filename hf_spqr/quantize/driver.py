"""The whole-model run: calibration data in, packed modules and a report out."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_spqr.calibration.blocks import Block, Recording, find_blocks, record, replay
from hf_spqr.calibration.data import calibration_batches, calibration_windows
from hf_spqr.config import SpQRConfig
from hf_spqr.errors import HfSpqrError, NonFiniteError
from hf_spqr.formats.spqr import SpQRWeight
from hf_spqr.methods import spqr
from hf_spqr.methods.base import LayerResult
from hf_spqr.nn import SpQRLinear
from hf_spqr.quantize.capture import gather_hessians, shared_inputs
from hf_spqr.quantize.targets import Target, check_weights, find_targets, left_alone
from hf_spqr.report import CalibrationReport, LayerReport, QuantizationReport

__all__ = ["quantize_model"]

logger = logging.getLogger(__name__)


def quantize_model(
    model: nn.Module,
    config: SpQRConfig,
    *,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize the linear layers in the blocks of ``model`` in place and say what was done.

    Every block sees the inputs that the quantized blocks before it give. One block at a time is on ``device``;
    activations are in host memory, the packed result is where the layer was.

    Args:
        model: a causal decoder of Transformers, weights present.
        config: method, layers and calibration data.
        tokenizer: tokenizer for text data; else ``config.tokenizer``, else the one of ``model.name_or_path``.
        device: where the blocks are computed; by default where they are.
        progress: show a bar with layer, error, bits per weight and time left.

    Returns:
        The report; it is also kept as ``model.quantization_report``.

    Raises:
        UnsupportedLayerError: no blocks, or nothing to quantize in them.
        NonFiniteError: NaN or infinity in a weight or an activation.
        CalibrationError: no or too little calibration data.
    """
    started = time.perf_counter()
    blocks = find_blocks(model)
    targets = find_targets(model, blocks, config)
    check_weights(targets)
    windows = calibration_windows(
        config.dataset,
        _tokenizer(model, tokenizer if tokenizer is not None else config.tokenizer, config.dataset),
        nsamples=config.nsamples,
        seqlen=_usable_seqlen(model, config.seqlen),
        seed=config.seed,
    )
    report = QuantizationReport(
        method=str(config.quant_method),
        config=config.to_dict(),
        calibration=CalibrationReport(
            _describe(config.dataset), len(windows), sum(w.numel() for w in windows), config.seqlen
        ),
        skipped=left_alone(model, targets),
    )
    recording = record(model, blocks, calibration_batches(windows))
    bar = tqdm(total=len(targets), desc="Quantizing", unit="layer", disable=not progress)
    run = _Run(model, config, blocks, targets, recording, report, bar, device)
    with bar:
        run.all_blocks()
    order = {target.name: position for position, target in enumerate(targets)}
    report.layers.sort(key=lambda layer: order[layer.name])
    report.config = config.to_dict()
    report.seconds = time.perf_counter() - started
    model.quantization_report = report  # type: ignore[assignment]
    return report


@dataclass
class _Run:
    """The state of one run; ``recording.hidden`` holds the inputs of the next block."""

    model: nn.Module
    config: SpQRConfig
    blocks: list[Block]
    targets: list[Target]
    recording: Recording
    report: QuantizationReport
    bar: tqdm
    device: torch.device | str | None

    def all_blocks(self) -> None:
        for index, block in enumerate(self.blocks):
            mine = {target.local_name: target for target in self.targets if target.block == index}
            home = next(block.module.parameters()).device
            block.module.to(self.device if self.device is not None else home)
            packed = self._quantize_block(index, block, mine) if mine else {}
            if index + 1 < len(self.blocks):
                self.recording.hidden = self._outputs(index, block)
            for local_name, module in packed.items():
                block.module.set_submodule(local_name, module)
            block.module.to(home)
            self.recording.calls[index] = []

    @torch.no_grad()
    def _outputs(self, index: int, block: Block) -> list[Tensor]:
        outputs = []
        for hidden, call in zip(self.recording.hidden, self.recording.calls[index], strict=True):
            output = replay(block.module, hidden, call).to("cpu")
            if not bool(torch.isfinite(output).all()):
                raise NonFiniteError(
                    f"The output of {block.name} contains NaN or infinity on the calibration data. A float16 model"
                    " that overflows should be quantized in bfloat16 or float32 (dtype=)."
                )
            outputs.append(output)
        return outputs

    def _quantize_block(self, index: int, block: Block, mine: dict[str, Target]) -> dict[str, nn.Module]:
        """Packed modules by local name. Until they are put in place, the layers hold their dequantized weights."""
        hidden, calls = self.recording.hidden, self.recording.calls[index]
        layers = {name: target.linear for name, target in mine.items()}
        groups = shared_inputs(block.module, layers, hidden[0], calls[0])
        steps = [[group] for group in groups] if self.config.true_sequential else [groups]
        packed: dict[str, nn.Module] = {}
        for step in steps:
            leaders = {group[0]: layers[group[0]] for group in step}
            sums = gather_hessians(
                block.module, leaders, hidden, calls, stop_early=self.config.true_sequential and len(step) == 1
            )
            for group in step:
                with _named(mine[group[0]].name):
                    hessian = sums.pop(group[0]).hessian()
                for name in group:
                    packed[name] = self._quantize_layer(mine[name], hessian)
        return packed

    @torch.no_grad()
    def _quantize_layer(self, target: Target, hessian: Tensor) -> nn.Module:
        self.bar.set_postfix_str(target.name)
        started = time.perf_counter()
        linear = target.linear
        with _named(target.name):
            result = spqr.quantize(linear.weight.detach(), hessian, self.config.params(target.name))
        assert isinstance(result.weight, SpQRWeight)
        dtype = linear.weight.dtype
        bias = None if linear.bias is None else linear.bias.detach()
        module = SpQRLinear.from_weight(result.weight, bias, dtype)
        module.backend = self.config.backend
        linear.weight = nn.Parameter(result.weight.dequantize(dtype), requires_grad=False)
        self._note(target, result, module, time.perf_counter() - started)
        return module

    def _note(self, target: Target, result: LayerResult, module: SpQRLinear, seconds: float) -> None:
        layer = LayerReport(
            name=target.name,
            shape=(module.out_features, module.in_features),
            method="spqr",
            bits=module.layout.bits,
            group_size=module.layout.group_size,
            nbytes=module.nbytes(),
            outliers=module.outliers(),
            error=result.error,
            seconds=seconds,
        )
        self.report.layers.append(layer)
        if result.damping_raised:
            self.report.notes.append(
                f"{target.name}: the Hessian was not positive definite, damping was raised to {result.percdamp:g}."
            )
        self.bar.set_postfix_str(f"{target.name} error {result.error:.4f}, {layer.bits_per_weight:.3f} bits")
        self.bar.update()


class _named(AbstractContextManager[None]):
    """Puts the name of a layer in front of the message of our own exceptions."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, HfSpqrError) and not str(error).startswith(self.name):
            raise type(error)(f"{self.name}: {error}") from error


def _usable_seqlen(model: nn.Module, seqlen: int) -> int:
    """``seqlen``, or what the model's position embeddings allow where that is less."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if isinstance(limit, int) and 0 < limit < seqlen:
        logger.warning("seqlen=%d is more than the %d positions of the model: %d are used.", seqlen, limit, limit)
        return limit
    return seqlen


def _tokenizer(model: nn.Module, tokenizer: Any, dataset: Any) -> Any:
    """A tokenizer object, loaded by name where it is one, or None where no data set can need it."""
    if tokenizer is None:
        tokenizer = getattr(model, "name_or_path", None) or None
    if not isinstance(tokenizer, str | os.PathLike):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError):
        return None  # token ids need none; text says clearly that it does


def _describe(dataset: Any) -> str:
    if isinstance(dataset, str | os.PathLike):
        return os.path.basename(os.fspath(dataset)) if os.path.exists(dataset) else str(dataset)
    kind = type(dataset).__name__
    return f"{kind} of {len(dataset)} items" if isinstance(dataset, Sequence) else kind
