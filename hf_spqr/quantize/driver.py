"""The whole-model run: calibration data in, packed modules and a report out."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_spqr.calibration.blocks import attending_parts, check_reads_text, record
from hf_spqr.calibration.data import calibration_batches, calibration_windows, check_tokens
from hf_spqr.config import OmniQuantConfig, PackedConfig, SpQRConfig, name_matches
from hf_spqr.errors import ConfigError
from hf_spqr.quantize.blockwise import OmniQuantRun
from hf_spqr.quantize.experts import find_experts
from hf_spqr.quantize.layerwise import SpQRRun
from hf_spqr.quantize.ranks import Ranks
from hf_spqr.quantize.size import Work, choose, fixed_bytes, matrices, smallest
from hf_spqr.quantize.targets import (
    check_weights,
    find_targets,
    left_alone,
    nothing_to_quantize,
    refuse_packed,
    selectable,
)
from hf_spqr.quantize.tokenizer import find_tokenizer
from hf_spqr.quantize.trial import Trial, try_out
from hf_spqr.report import CalibrationReport, QuantizationReport
from hf_spqr.report.card import hub_name

__all__ = ["least_bytes", "quantize_model", "settle"]

logger = logging.getLogger(__name__)


def quantize_model(
    model: nn.Module,
    config: SpQRConfig | OmniQuantConfig,
    *,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize the linear layers in the blocks of ``model`` in place and say what was done.

    Every block sees the inputs that the quantized blocks before it give. One block at a time is on ``device``;
    activations are in host memory, the packed result is where the layer was.

    In a process group of torch.distributed the ranks share the work: every one has to call this with the same model
    and config, and every one gets the quantized model. SpQR gives what one process gives; see docs/distributed.md.

    Args:
        model: a decoder of Transformers (its language part, where it has others) or a text encoder-decoder.
        config: method, layers and calibration data. Fields that were left to the method are filled in.
        tokenizer: tokenizer for text data; else ``config.tokenizer``, else the one of ``model.name_or_path``.
        device: where the blocks are computed; by default where they are.
        progress: show a bar with layer, error, bits per weight (of a block in training: step, loss, best loss on the
            samples kept out) and time left.

    Returns:
        The report; it is also kept as ``model.quantization_report``.

    Raises:
        ConfigError: the model cannot have the size that the config asks for.
        UnsupportedLayerError: nothing to quantize, or a model that is packed already or cannot be calibrated on text;
            for OmniQuant also one whose blocks are no chain.
        NonFiniteError: NaN or infinity in a weight or an activation.
        CalibrationError: no or too little calibration data, or fewer batches of it than processes.
        RankError: another process has failed.
    """
    ranks = Ranks()
    try:
        return _quantize(model, config, tokenizer, device, progress, ranks)
    finally:
        ranks.close()


def _quantize(
    model: nn.Module,
    config: SpQRConfig | OmniQuantConfig,
    tokenizer: Any,
    device: torch.device | str | None,
    progress: bool,
    ranks: Ranks,
) -> QuantizationReport:
    started = time.perf_counter()
    if not isinstance(config, SpQRConfig | OmniQuantConfig):
        raise ConfigError(f"config is a {type(config).__name__}: pass an SpQRConfig or an OmniQuantConfig.")
    spqr = isinstance(config, SpQRConfig)
    with ranks.together():
        refuse_packed(model)
        settle(model, config)
        check_weights(model, _chosen(_find_work(model, config)), config)
    windows = ranks.from_first(lambda: _windows(model, config, config.tokenizer if tokenizer is None else tokenizer))
    with _evaluating(model):
        trial = ranks.from_first(lambda: try_out(model, config, windows[0]))
    with ranks.together():
        stacks = _find_work(model, config, trial)
    report = QuantizationReport(
        method=str(config.quant_method),
        config=config.to_dict(),
        calibration=CalibrationReport(
            _describe(config.dataset), len(windows), sum(w.numel() for w in windows), config.seqlen
        ),
        skipped=left_alone(model, _chosen(stacks)),
        base_model=_hub_source(model),
        notes=trial.notes(),
    )
    if isinstance(config, OmniQuantConfig):
        _settle_attention(model, config, report)
    kind: Any = SpQRRun if spqr else OmniQuantRun
    batches = calibration_batches(windows) if spqr else windows
    if kind.divides_data:
        with ranks.together():
            batches = ranks.part(batches)
    names = _names_in_order(model, stacks)
    idle = [
        f"overrides: {pattern!r} selects no layer that is quantized."
        for pattern in config.overrides
        if not any(name_matches(pattern, name) for name in names)
    ]
    idle += [
        f"modules_to_not_convert: {pattern!r} selects no module."
        for pattern in config.modules_to_not_convert or ()
        if not any(name_matches(pattern, name) for name in selectable(model))
    ]
    for note in idle if ranks.first else ():
        logger.warning(note)  # a slip of the pen, while the work can still be stopped
    report.notes += idle
    shown = progress and ranks.first
    bar = tqdm(total=len(names), desc="Quantizing", unit="layer", miniters=0, disable=not shown)
    with bar, _evaluating(model):
        for stack in stacks:
            with ranks.together():
                recording = record(model, stack[0], batches)
            kind(model, config, *stack, recording, report, bar, device, ranks).quantize()
    order = {name: position for position, name in enumerate(names)}
    report.layers.sort(key=lambda layer: order[layer.name])
    report.config = config.to_dict()
    report.seconds = time.perf_counter() - started
    model.quantization_report = report  # type: ignore[assignment]
    return report


def settle(model: nn.Module, config: PackedConfig) -> None:
    """Fill in what ``config`` leaves to the method, and the bits and group size that ``target_bits`` asks for.

    ``model`` may be on the meta device. Raises ConfigError: the target is out of reach; UnsupportedLayerError: nothing
    to quantize.
    """
    config.settle()
    if isinstance(config, SpQRConfig) and config.target_bits is not None:
        choose(config, [matrices([stack]) for stack in _find_work(model, smallest(config))])


def least_bytes(model: nn.Module, config: PackedConfig) -> int:
    """What the weights of ``model`` take at least once they are quantized and saved, in bytes.

    Outliers are not counted, but where ``config.target_bits`` says how many there are; bits and group size must be
    known by then (:func:`settle`). ``model`` may be on the meta device. Raises UnsupportedLayerError: nothing to
    quantize.
    """
    found = matrices(_find_work(model, config))
    packed = fixed_bytes(config, found)
    if isinstance(config, SpQRConfig) and config.target_bits is not None:
        packed = max(packed, int(sum(m.weights for m in found) * config.target_bits / 8))
    return sum(parameter.nbytes for parameter in model.parameters()) - sum(m.nbytes for m in found) + packed


def _find_work(model: nn.Module, config: PackedConfig, trial: Trial | None = None) -> list[Work]:
    """The stacks of blocks of ``model`` with what is quantized in each, after the ``trial`` or before it."""
    check_reads_text(model)
    trial = trial or Trial.ahead(model)
    stacks = [
        (
            blocks,
            [target for target in find_targets(model, blocks, config) if target.name not in trial.read],
            find_experts(model, blocks, config),
        )
        for blocks in trial.stacks(model)
    ]
    if not any(targets or experts for _, targets, experts in stacks):
        raise nothing_to_quantize(model, [block for blocks, _, _ in stacks for block in blocks])
    return stacks


def _chosen(stacks: Sequence[Work]) -> dict[str, nn.Module]:
    """The modules that are quantized by name."""
    linears = {target.name: target.linear for _, targets, _ in stacks for target in targets}
    return linears | {target.name: target.module for _, _, experts in stacks for target in experts}


def _windows(model: nn.Module, config: SpQRConfig | OmniQuantConfig, tokenizer: Any) -> list[Tensor]:
    """The calibration data as token ids that the model knows."""
    windows = calibration_windows(
        config.dataset,
        find_tokenizer(model, tokenizer),
        nsamples=config.nsamples,
        seqlen=_usable_seqlen(model, config.seqlen),
        seed=config.seed,
    )
    check_tokens(model, min(int(w.min()) for w in windows), max(int(w.max()) for w in windows))
    return windows


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _settle_attention(model: nn.Module, config: OmniQuantConfig, report: QuantizationReport) -> None:
    """Leave q, k, v alone where inference could not quantize them: what is learned must be what runs."""
    if config.act_bits is None or not config.params().quantize_attention:
        return
    parts = attending_parts(model)
    if not parts or not all(map(_attends_by_sdpa, parts)):
        config.learning["quantize_attention"] = False
        report.notes.append(
            f"{type(model).__name__} does not compute attention by scaled_dot_product_attention, or not through"
            " Transformers' attention interface: q, k and v stay in full precision, the inputs of the layers are"
            " quantized."
        )


def _attends_by_sdpa(part: Any) -> bool:
    """Whether scaled_dot_product_attention is all of the attention (it knows no soft cap, Gemma 2) and replaceable.

    Transformers 5.17 says that a model with a soft cap supports it, and drops the cap there.
    """
    config = part.config.get_text_config()
    without_cap = getattr(config, "attn_logit_softcapping", None) is None
    return without_cap and part._supports_sdpa and part._can_set_attn_implementation()


def _names_in_order(model: nn.Module, stacks: Sequence[Work]) -> list[str]:
    """The names of the layers to quantize, projections of experts among them, in the order of the model."""
    named = {target.name: [target.name] for _, targets, _ in stacks for target in targets}
    named |= {target.name: list(target.projections) for _, _, experts in stacks for target in experts}
    return [layer for name, _ in model.named_modules() for layer in named.get(name, ())]


def _usable_seqlen(model: nn.Module, seqlen: int) -> int:
    """``seqlen``, or what the model's position embeddings allow where that is less."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if isinstance(limit, int) and 0 < limit < seqlen:
        logger.warning("seqlen=%d is more than the %d positions of the model: %d are used.", seqlen, limit, limit)
        return limit
    return seqlen


def _hub_source(model: nn.Module) -> str | None:
    """The repository that the model came from; None for a folder, whose path is nobody's business."""
    name = getattr(model, "name_or_path", None)
    return None if name and os.path.isdir(name) else hub_name(name)


def _describe(dataset: Any) -> str:
    if isinstance(dataset, str | os.PathLike):
        return os.path.basename(os.fspath(dataset)) if os.path.exists(dataset) else str(dataset)
    kind = type(dataset).__name__
    return f"{kind} of {len(dataset)} items" if isinstance(dataset, Sequence) else kind
