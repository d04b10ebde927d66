"""Walk a decoder block by block: find the blocks, record what each receives, replay one at a time.

A model is run once with its blocks replaced by recorders that pass the hidden states through. Each recorder keeps the
arguments that its own block was given (masks and rotary tables differ between layers in many models), so that a block
can be called afterwards exactly as the model calls it. Hidden states live in host memory.

A model whose blocks are no chain (they are run in a loop, or something is computed between them) is one block as a
whole, whose "hidden states" are the token ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_spqr.errors import CalibrationError, UnsupportedLayerError

__all__ = [
    "Block", "Call", "NoChainError", "Recording", "attending_parts", "check_reads_text", "find_blocks", "find_stacks",
    "find_wholes", "finish", "record", "replay", "stored_parts",
]  # fmt: skip

BLOCK_LISTS = ("layers", "h", "blocks", "layer", "block")
HIDDEN = "hidden_states"
CACHES = ("cache", "past_key_values", "cache_params")
"""What blocks call the keys and values of earlier tokens: the name since Transformers 5.24, and before."""


class NoChainError(UnsupportedLayerError):
    """The blocks of a model are no chain in which each gets what the one before it gives."""


@dataclass(frozen=True)
class Block:
    """One decoder block: its full name in the model (empty for the model itself) and the module."""

    name: str
    module: nn.Module

    def inside(self, local_name: str) -> str:
        """The full name of a module in the block."""
        return f"{self.name}.{local_name}" if self.name else local_name


@dataclass
class Call:
    """The arguments of one call of a block, without its hidden states.

    ``args`` are the positional arguments after the hidden states; ``keyword`` is the name by which the hidden states
    themselves were given, None where they were positional.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None = None


@dataclass
class Recording:
    """``batches[b]``: token ids; ``hidden[b]``: what the first block is given for them, in host memory;
    ``calls[i][b]``: arguments of block ``i`` for them."""

    batches: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of all stacks of ``model``, in order; see :func:`find_stacks`."""
    return [block for stack in find_stacks(model) for block in stack]


def check_reads_text(model: Any) -> None:
    """Raise UnsupportedLayerError unless ``model`` can be called with token ids, which calibration data are."""
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    reads = getattr(model if is_pair else _decoder(model), "main_input_name", "input_ids")
    if reads != "input_ids":
        raise UnsupportedLayerError(
            f"{type(model).__name__} reads {reads}: models are calibrated on text, which works for decoders, encoders"
            " and encoder-decoders that read input_ids."
        )


def find_stacks(model: nn.Module) -> list[list[Block]]:
    """The blocks of the decoder of ``model`` (of its language part, where it has others), in order.

    A model with an encoder and a decoder for text has two stacks, of which the encoder comes first.

    Raises:
        NoChainError: there is no list of blocks.
    """
    return [_blocks_of(model, part) for part in _parts(model)]


def find_wholes(model: nn.Module) -> list[list[Block]]:
    """The decoder of ``model`` (before it the encoder of one that has both) as a stack of a single block."""
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    return [[Block(names[id(part)], part)] for part in _parts(model)]


def stored_parts(model: nn.Module) -> list[str]:
    """Starts of the names of parameters that a checkpoint must have whatever head is on the model: those in lists of
    modules of the decoder, and of the encoder; all of the decoder where it has no list."""
    found: list[str] = []
    for [whole] in find_wholes(model):
        lists: list[str] = []
        for name, _ in _lists_of(whole.module):  # from the outside in
            if not name.startswith(tuple(lists)):
                lists.append(f"{name}.")
        found += map(whole.inside, lists or [""])
    return found


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
    lists = _lists_of(decoder)
    if not lists:
        raise NoChainError(
            f"No decoder blocks found in {type(model).__name__}: expected an nn.ModuleList of blocks, for example"
            " `model.layers`."
        )
    usual = [item for item in lists if item[0].rpartition(".")[2] in BLOCK_LISTS]
    # the outermost list wins (experts and branches are lists too, inside a block)
    name, blocks = min(usual or lists, key=lambda item: (item[0].count("."), -len(item[1])))
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    path = f"{prefix}.{name}" if prefix else name
    return [Block(f"{path}.{index}", block) for index, block in enumerate(blocks)]


def _lists_of(part: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The lists of modules in ``part`` that hold matrices, with their names in it."""
    lists = [(name, module) for name, module in part.named_modules() if isinstance(module, nn.ModuleList)]
    return [(name, module) for name, module in lists if len(module) and _has_matrix(module[0])]


@torch.no_grad()
def record(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Tensor]) -> Recording:
    """Run ``model`` once per batch of token ids [n, length] and keep what each block of one stack is given.

    The model is put in evaluation mode for this and no block of the stack is executed, except one of each class for
    each shape of a batch, to learn what its calls return.

    Raises:
        CalibrationError: there are no batches.
        NoChainError: blocks are left out, called more than once or without hidden states, or the model does something
            with the hidden states between them.
    """
    if not batches:
        raise CalibrationError("There are no calibration batches.")
    recording = Recording(list(batches), calls=[[] for _ in blocks])
    chain = _Chain(blocks)
    outputs: dict[tuple[type, torch.Size], Any] = {}
    device = next(model.parameters()).device
    run = _runner(model, blocks)
    training = model.training
    model.eval()
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(_restore, block.module, block.module.__dict__.get("forward"))
            block.module.forward = _recorder(recording, index, block, outputs, chain)
        try:
            for batch in batches:
                run(batch.to(device))
                chain.end()
        finally:
            model.train(training)
    return recording


def finish(model: nn.Module, blocks: Sequence[Block], ids: Tensor, hidden: Tensor) -> Any:
    """What ``model`` as a whole gives for token ids [n, length] where the last of ``blocks`` gives ``hidden``.

    No block of the stack is executed, except one of each class, to learn what its calls return. Gradients flow from
    the result to ``hidden`` unless the caller disables them.
    """
    outputs: dict[type, Any] = {}
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(_restore, block.module, block.module.__dict__.get("forward"))
            block.module.forward = _giver(hidden, block, outputs)
        return _whole(model)(ids.to(next(model.parameters()).device))


def replay(block: nn.Module, hidden: Tensor, call: Call, device: torch.device | str | None = None) -> Tensor:
    """Call ``block`` as the model did, on ``hidden`` [n, length, features]; returns its output hidden states.

    Arguments are moved to ``device`` (by default that of the block's parameters) and the result stays there. Gradients
    flow unless the caller disables them.
    """
    if device is None:
        device = next(block.parameters()).device
    hidden = hidden.to(device)
    args, kwargs = _to_device(call.args, device), {k: _to_device(v, device) for k, v in call.kwargs.items()}
    output = block(hidden, *args, **kwargs) if call.keyword is None else block(**{call.keyword: hidden}, **kwargs)
    if isinstance(output, dict):
        output = tuple(output.values())
    return output[0] if isinstance(output, tuple | list) else output


def _parts(model: nn.Module) -> list[nn.Module]:
    """The decoder, after the encoder of a model that has both."""
    encoder = _encoder(model)
    return [_decoder(model)] if encoder is None else [encoder, _decoder(model)]


def _decoder(model: nn.Module) -> nn.Module:
    found = [part for part in (_innermost(model, "get_decoder"), getattr(model, "base_model", model)) if part]
    # what a head for masked words calls its decoder is a linear layer
    return next((part for part in found if _lists_of(part)), found[-1])


def _innermost(model: Any, getter: str) -> Any:
    """What ``getter`` gives, asked again of that: the language model of Florence 2 has an encoder and a decoder."""
    part = getattr(model, getter, lambda: model)()
    return part if part is model or not isinstance(part, nn.Module) else _innermost(part, getter)


def _encoder(model: nn.Module) -> nn.Module | None:
    """The text encoder of an encoder-decoder model, else None; so too where a model has no more than the encoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = _innermost(model, "get_encoder")
    alone = any(module is encoder for module in _decoder(model).modules())
    return None if alone else encoder


def _runner(model: nn.Module, blocks: Sequence[Block]) -> Callable[[Tensor], Any]:
    """What calls the stack of ``blocks`` on token ids: no more of the model than is needed for that."""
    encoder = _encoder(model)
    if encoder is None:
        return lambda ids: _decoder(model)(input_ids=ids, use_cache=False)
    if any(module is blocks[0].module for module in encoder.modules()):
        return lambda ids: encoder(input_ids=ids)
    # without a head, which may look for tokens that end a text
    return _pair(getattr(model, "base_model", model), model.config)


def _whole(model: nn.Module) -> Callable[[Tensor], Any]:
    """What calls all of ``model`` on token ids, with its head."""
    if _encoder(model) is None:
        return lambda ids: model(input_ids=ids, use_cache=False)
    return _pair(model, model.config)


def _pair(model: nn.Module, config: Any) -> Callable[[Tensor], Any]:
    """What calls an encoder and a decoder on token ids, which the decoder gets moved on by one."""
    tokens = [getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id")]
    start = next((token for token in tokens if isinstance(token, int)), 0)

    def decode(ids: Tensor) -> Any:
        shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
        return model(input_ids=ids, decoder_input_ids=shifted, use_cache=False)

    return decode


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() == 2 for parameter in module.parameters())


class _Chain:
    """Checks while a model is run that each of ``blocks`` is called once, in order, on what the one before it gave."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks, self.next, self.given = blocks, 0, torch.empty(0)

    def enter(self, index: int, hidden: Tensor) -> None:
        name = self.blocks[index].name
        if index < self.next:
            raise NoChainError(f"{name} is called more than once for each sequence.")
        if index > self.next:
            raise NoChainError(f"{self.blocks[self.next].name} is not called before {name}.")
        if index and not (self.given is hidden or _close(self.given.to(hidden.device), hidden)):
            before = self.blocks[index - 1].name
            raise NoChainError(f"{name} is not given what {before} gives: the model computes something between them.")
        self.next, self.given = index + 1, hidden

    def end(self) -> None:
        """To be called after each pass of the model."""
        if self.next < len(self.blocks):
            raise NoChainError(f"{self.blocks[self.next].name} is not called.")
        self.next = 0


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-3, equal_nan=True)


def _recorder(
    recording: Recording,
    index: int,
    block: Block,
    outputs: dict[tuple[type, torch.Size], Any],
    chain: _Chain,
) -> Callable[..., Any]:
    original = block.module.forward
    kind = type(block.module)
    first = next(iter(inspect.signature(original).parameters), HIDDEN)

    def forward(*args: Any, **kwargs: Any) -> Any:
        keyword = None if args else HIDDEN if HIDDEN in kwargs else first
        hidden = args[0] if keyword is None else kwargs.get(keyword)
        if not isinstance(hidden, Tensor):
            raise NoChainError(f"{block.name} ({kind.__name__}) is not called with hidden states.")
        chain.enter(index, hidden)
        key = kind, hidden.shape  # what comes back beside the hidden states may depend on their length: biases, masks
        if key not in outputs:
            outputs[key] = original(*args, **kwargs)
        if index == 0:
            recording.hidden.append(hidden.to("cpu"))
        given = {k: None if k in CACHES else v for k, v in kwargs.items() if k != keyword}
        calls = recording.calls[index]
        call = Call(tuple(args[1:]), given, keyword)
        calls.append(_share(call, calls[-1]) if calls else call)
        output = outputs[key]
        return output if isinstance(output, dict) else _instead(output, hidden)  # a dict: of a model as a whole

    return forward


def _giver(hidden: Tensor, block: Block, outputs: dict[type, Any]) -> Callable[..., Any]:
    """A forward for ``block`` that gives ``hidden``, with what else its class returns."""
    original, kind = block.module.forward, type(block.module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kind not in outputs:
            with torch.no_grad():
                outputs[kind] = original(*args, **kwargs)
        return _instead(outputs[kind], hidden)

    return forward


def _instead(output: Any, hidden: Tensor) -> Any:
    """``hidden`` in the place of that of a block's output."""
    return (hidden, *output[1:]) if isinstance(output, tuple | list) else hidden


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward


def _share(call: Call, before: Call) -> Call:
    """``call`` with its tensors replaced by equal ones of the previous batch: masks and tables are kept once."""
    args = tuple(_share_value(new, old) for new, old in zip(call.args, before.args, strict=False))
    kwargs = {k: _share_value(v, before.kwargs.get(k)) for k, v in call.kwargs.items()}
    return Call(args if len(args) == len(call.args) else call.args, kwargs, call.keyword)


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
