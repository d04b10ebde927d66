"""Tries a model out before it is quantized: what cannot be calibrated or packed shows while no work is lost.

A few tokens are run through it. They show whether its blocks are a chain, which is what calibration block by block
takes them for, and which layers are not called but have their ``weight`` read by the code around them (``dt_proj`` of
Mamba), which a packed layer does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_spqr.calibration.blocks import (
    Block,
    Call,
    NoChainError,
    Recording,
    find_stacks,
    find_wholes,
    record,
    replay,
)
from hf_spqr.config import OmniQuantConfig, PackedConfig
from hf_spqr.errors import MISFITS, UnsupportedLayerError
from hf_spqr.nn import dense
from hf_spqr.quantize.targets import find_targets

__all__ = ["Trial", "read_by_others", "try_out"]

TOKENS = 64
"""How many are run through the model."""


@dataclass
class Trial:
    """What came out.

    whole   why the model is calibrated as a whole instead of block by block; None where its blocks are a chain
    read    full names of layers whose weights are read by the code around them
    """

    whole: str | None = None
    read: frozenset[str] = frozenset()

    @classmethod
    def ahead(cls, model: nn.Module) -> Trial:
        """What can be said before it: that there is no list of blocks."""
        try:
            find_stacks(model)
        except NoChainError as error:
            return cls(str(error))
        return cls()

    def stacks(self, model: nn.Module) -> list[list[Block]]:
        """The stacks of blocks to walk through."""
        return find_stacks(model) if self.whole is None else find_wholes(model)

    def notes(self) -> list[str]:
        """What the report should say in words."""
        notes = []
        if self.whole is not None:
            notes.append(f"All blocks were calibrated at once, on the inputs of the unquantized model: {self.whole}")
        if self.read:
            some = ", ".join(sorted(self.read)[:3])
            notes.append(
                f"{len(self.read)} layers were left alone, for the model's code reads their weights instead of calling"
                f" them: {some}{', ...' if len(self.read) > 3 else ''}."
            )
        return notes


def try_out(model: nn.Module, config: PackedConfig, ids: Tensor) -> Trial:
    """Run the first of the token ids [1, length] through ``model``.

    Raises:
        UnsupportedLayerError: the model cannot be run on token ids alone; or its blocks are no chain, and the method
            learns one block after the other.
    """
    ids, whole = ids[:, :TOKENS], None
    try:
        stacks = find_stacks(model)
        recordings = [record(model, blocks, [ids]) for blocks in stacks]
    except MISFITS as error:
        whole = str(error) if isinstance(error, NoChainError) else f"{type(error).__name__}: {error}."
        if isinstance(config, OmniQuantConfig):
            raise UnsupportedLayerError(
                f"OmniQuant learns one block after the other, which {type(model).__name__} does not allow: {whole}"
                " Try SpQR (SpQRConfig, --method spqr), which takes other models too."
            ) from error
        stacks = find_wholes(model)
        recordings = _record_wholes(model, stacks, ids)
    read: set[str] = set()
    tried: dict[tuple[object, ...], set[str]] = {}  # blocks of one kind behave alike
    for blocks, recording in zip(stacks, recordings, strict=True):
        targets = find_targets(model, blocks, config)
        for index, block in enumerate(blocks):
            layers = {target.local_name: target.linear for target in targets if target.block == index}
            kind = (type(block.module), *layers)
            if kind not in tried:
                tried[kind] = read_by_others(block.module, layers, recording.hidden[0], recording.calls[index][0])
            read.update(map(block.inside, tried[kind]))
    return Trial(whole, frozenset(read))


@torch.no_grad()
def read_by_others(block: nn.Module, layers: Mapping[str, nn.Module], hidden: Tensor, call: Call) -> set[str]:
    """Names of those of ``layers`` without whose ``weight`` the block fails or computes something else."""
    expected = replay(block, hidden, call)

    def needed(names: Iterable[str]) -> bool:
        with _without_weights(block, {name: layers[name] for name in names}):
            try:
                output = replay(block, hidden, call)
            except MISFITS:
                return True
        return not bool((output - expected).norm() <= 1e-2 * expected.norm()) and bool(expected.isfinite().all())

    return {name for name in layers if needed([name])} if needed(layers) else set()


class _WithoutWeight(nn.Module):
    """Computes what a linear layer computes, and has no more of it to offer than a packed layer has."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = [layer]  # not a submodule
        self.out_features, self.in_features = dense.features(layer)
        self.weight = nn.Parameter(dense.matrix(layer).new_empty(0), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer[0](x)


@contextmanager
def _without_weights(block: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    try:
        for name, layer in layers.items():
            block.set_submodule(name, _WithoutWeight(layer))
        yield
    finally:
        for name, layer in layers.items():
            block.set_submodule(name, layer)


def _record_wholes(model: nn.Module, stacks: list[list[Block]], ids: Tensor) -> list[Recording]:
    try:
        return [record(model, blocks, [ids]) for blocks in stacks]
    except MISFITS as error:
        raise UnsupportedLayerError(
            f"{type(model).__name__} cannot be run on token ids alone ({type(error).__name__}: {error}), and those are"
            " what it is calibrated on."
        ) from error
