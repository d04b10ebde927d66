"""Walk a decoder block by block: find the blocks, record what each receives, replay one at a time.

A model is run once with its blocks replaced by recorders that pass the hidden states through. Each recorder keeps the
arguments that its own block was given (masks and rotary tables differ between layers in many models), so that a block
can be called afterwards exactly as the model calls it. Hidden states live in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_spqr.errors import CalibrationError, UnsupportedLayerError

__all__ = [
    "Block", "Call", "Recording", "attending_parts", "check_reads_text", "find_blocks", "find_stacks", "record",
    "replay",
]  # fmt: skip

BLOCK_LISTS = ("layers", "h", "blocks", "layer", "block")
HIDDEN = "hidden_states"
CACHES = ("cache", "past_key_values", "cache_params")
"""What blocks call the keys and values of earlier tokens: the name since Transformers 5.24, and before."""


@dataclass(frozen=True)
class Block:
    """One decoder block: its full name in the model and the module."""

    name: str
    module: nn.Module


@dataclass
class Call:
    """The arguments of one call of a block, without its hidden states.

    ``args`` are the positional arguments after the hidden states; ``positional`` says whether the hidden states
    themselves were positional.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positional: bool = True


@dataclass
class Recording:
    """``hidden[b]``: input of the first block for batch ``b``, in host memory; ``calls[i][b]``: arguments of block
    ``i`` for batch ``b``."""

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of all stacks of ``model``, in order; see :func:`find_stacks`."""
    return [block for stack in find_stacks(model) for block in stack]


def check_reads_text(model: Any) -> None:
    """Raise UnsupportedLayerError unless ``model`` can be called with token ids, which calibration data are."""
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    reads = getattr(model if is_pair else _decoder(model), "main_input_name", "input_ids")
    try:
        if reads == "input_ids" and hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings()
    except NotImplementedError:
        reads = "more than one kind of input"
    if reads != "input_ids":
        raise UnsupportedLayerError(
            f"{type(model).__name__} reads {reads}: models are calibrated on text, which works for decoders, encoders"
            " and encoder-decoders that read input_ids."
        )


def find_stacks(model: nn.Module) -> list[list[Block]]:
    """The blocks of the decoder of ``model`` (of its language part, where it has others), in order.

    A model with an encoder and a decoder for text has two stacks, of which the encoder comes first.

    Raises:
        UnsupportedLayerError: there is no list of blocks.
    """
    encoder = _encoder(model)
    stacks = [] if encoder is None else [_blocks_of(model, encoder)]
    return [*stacks, _blocks_of(model, _decoder(model))]


def attending_parts(model: nn.Module) -> list[Any]:
    """The models inside ``model`` whose configs say how its blocks attend: of one with a vision tower, the language
    model. Raises UnsupportedLayerError if there are no blocks."""
    parts: dict[str, nn.Module] = {}
    blocks = [block.name for block in find_blocks(model)]
    for name, module in model.named_modules():  # from the outside in
        if hasattr(module, "set_attn_implementation"):
            parts |= {block: module for block in blocks if not name or block.startswith(f"{name}.")}
    return list({id(part): part for part in parts.values()}.values())


def _blocks_of(model: nn.Module, decoder: nn.Module) -> list[Block]:
    """The longest ``nn.ModuleList`` of ``decoder``, one with a usual name (``layers``, ``h``, ...) before others."""
    lists = [(name, module) for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(name, module) for name, module in lists if len(module) and _has_matrix(module[0])]
    if not lists:
        raise UnsupportedLayerError(
            f"No decoder blocks found in {type(model).__name__}: expected an nn.ModuleList of blocks, for example"
            " `model.layers`."
        )
    usual = [item for item in lists if item[0].rpartition(".")[2] in BLOCK_LISTS]
    # the outermost list wins (experts and branches are lists too, inside a block)
    name, blocks = min(usual or lists, key=lambda item: (item[0].count("."), -len(item[1])))
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    path = f"{prefix}.{name}" if prefix else name
    return [Block(f"{path}.{index}", block) for index, block in enumerate(blocks)]


@torch.no_grad()
def record(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Tensor]) -> Recording:
    """Run ``model`` once per batch of token ids [n, length] and keep what each block of one stack is given.

    The model is put in evaluation mode for this and no block of the stack is executed, except one of each class for
    each shape of a batch, to learn what its calls return.

    Raises:
        CalibrationError: there are no batches, or the model does not call its blocks.
        UnsupportedLayerError: a block is called without hidden states.
    """
    if not batches:
        raise CalibrationError("There are no calibration batches.")
    recording = Recording(calls=[[] for _ in blocks])
    extras: dict[tuple[type, torch.Size], tuple[Any, ...] | None] = {}
    device = next(model.parameters()).device
    run = _runner(model, blocks)
    training = model.training
    model.eval()
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(_restore, block.module, block.module.__dict__.get("forward"))
            block.module.forward = _recorder(recording, index, block, extras)
        try:
            for batch in batches:
                run(batch.to(device))
        finally:
            model.train(training)
    for block, calls in zip(blocks, recording.calls, strict=True):
        if len(calls) != len(batches):
            raise CalibrationError(
                f"{block.name} was called {len(calls)} times for {len(batches)} batches: blocks that are skipped or"
                " shared between layers cannot be calibrated one by one."
            )
    return recording


def replay(block: nn.Module, hidden: Tensor, call: Call, device: torch.device | str | None = None) -> Tensor:
    """Call ``block`` as the model did, on ``hidden`` [n, length, features]; returns its output hidden states.

    Arguments are moved to ``device`` (by default that of the block's parameters) and the result stays there. Gradients
    flow unless the caller disables them.
    """
    if device is None:
        device = next(block.parameters()).device
    hidden = hidden.to(device)
    args, kwargs = _to_device(call.args, device), {k: _to_device(v, device) for k, v in call.kwargs.items()}
    output = block(hidden, *args, **kwargs) if call.positional else block(*args, **{HIDDEN: hidden}, **kwargs)
    return output[0] if isinstance(output, tuple | list) else output


def _decoder(model: nn.Module) -> nn.Module:
    for getter in ("get_decoder", "base_model"):
        found = getattr(model, getter, None)
        found = found() if getter == "get_decoder" and callable(found) else found
        if isinstance(found, nn.Module):
            return found
    return model


def _encoder(model: nn.Module) -> nn.Module | None:
    """The text encoder of an encoder-decoder model, else None."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    return model.get_encoder()  # type: ignore[operator]


def _runner(model: nn.Module, blocks: Sequence[Block]) -> Callable[[Tensor], Any]:
    """What calls the stack of ``blocks`` on token ids: no more of the model than is needed for that."""
    encoder = _encoder(model)
    if encoder is None:
        return lambda ids: _decoder(model)(input_ids=ids, use_cache=False)
    if any(module is blocks[0].module for module in encoder.modules()):
        return lambda ids: encoder(input_ids=ids)
    tokens = [getattr(model.config, name, None) for name in ("decoder_start_token_id", "bos_token_id")]
    start = next((token for token in tokens if isinstance(token, int)), 0)

    def decode(ids: Tensor) -> Any:
        shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
        return model(input_ids=ids, decoder_input_ids=shifted, use_cache=False)

    return decode


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() == 2 for parameter in module.parameters())


def _recorder(
    recording: Recording, index: int, block: Block, extras: dict[tuple[type, torch.Size], tuple[Any, ...] | None]
) -> Callable[..., Any]:
    original = block.module.forward
    kind = type(block.module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        positional = bool(args)
        if not positional and HIDDEN not in kwargs:
            raise UnsupportedLayerError(f"{block.name} ({kind.__name__}) is not called with hidden states.")
        hidden = args[0] if positional else kwargs[HIDDEN]
        key = kind, hidden.shape  # what comes back beside the hidden states may depend on their length: biases, masks
        if key not in extras:
            output = original(*args, **kwargs)
            extras[key] = tuple(output[1:]) if isinstance(output, tuple | list) else None
        if index == 0:
            recording.hidden.append(hidden.to("cpu"))
        given = {k: None if k in CACHES else v for k, v in kwargs.items() if k != HIDDEN}
        calls = recording.calls[index]
        call = Call(tuple(args[1:]), given, positional)
        calls.append(_share(call, calls[-1]) if calls else call)
        more = extras[key]
        return hidden if more is None else (hidden, *more)

    return forward


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward


def _share(call: Call, before: Call) -> Call:
    """``call`` with its tensors replaced by equal ones of the previous batch: masks and tables are kept once."""
    args = tuple(_share_value(new, old) for new, old in zip(call.args, before.args, strict=False))
    kwargs = {k: _share_value(v, before.kwargs.get(k)) for k, v in call.kwargs.items()}
    return Call(args if len(args) == len(call.args) else call.args, kwargs, call.positional)


def _share_value(new: Any, old: Any) -> Any:
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and new.shape == old.shape and new.dtype == old.dtype
        return old if same and torch.equal(new, old) else new
    if type(new) is tuple and type(old) is tuple and len(new) == len(old):
        return tuple(_share_value(a, b) for a, b in zip(new, old, strict=True))
    return new


def _to_device(value: Any, device: torch.device | str) -> Any:
    """Tensors, and tuples or lists of them, on ``device``; anything else (caches, dicts shared by layers) as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_to_device(item, device) for item in value)
    return value
