"""Packed layers in engines that fuse and split them: q, k and v in one layer, rows or columns over several devices.

A file holds each matrix by itself. An engine has one layer for several of them and hands over the tensors of a file
one at a time, in any order; :class:`Shards` keeps what this device needs of each and makes modules of it in the end.
Nothing here knows an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_spqr.config import PackedConfig
from hf_spqr.errors import CheckpointError, UnsupportedLayerError
from hf_spqr.formats.columns import check_perm
from hf_spqr.formats.parts import Matrix, join_rows, joinable, take_columns, take_rows
from hf_spqr.integrations.checkpoint import check_order
from hf_spqr.nn import PackedLinear
from hf_spqr.nn.dense import make_dense

__all__ = ["Part", "Shards"]


@dataclass(frozen=True)
class Part:
    """One of the matrices of a fused layer: its name in the file, its rows there, and which of them are needed."""

    name: str
    rows: int
    start: int
    stop: int


@dataclass
class _Source:
    """What has come of one matrix of the file."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    pieces: list[Matrix | Tensor] | None = None
    """What is needed of it, once all is there: packed matrices, or dense weights of a layer that is not packed."""


class Shards:
    """Collects the tensors of one layer.

    Args:
        config: the quantization config of the file.
        module_class: the module of a packed matrix.
        name: the layer's name, which also names a matrix of the file that covers several parts.
        parts: the matrices of the layer from top to bottom.
        in_features: columns of the matrices in the file.
        columns: which of them are needed, from (included) and to (not included).
        dtype: of a dense weight, and what packed modules say is theirs.
        device: where the modules go.
    """

    def __init__(
        self,
        config: PackedConfig,
        module_class: type[PackedLinear],
        name: str,
        parts: Sequence[Part],
        in_features: int,
        columns: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.module_class = config, module_class
        self.dtype, self.device = dtype, device
        self.name, self.parts = name, list(parts)
        self.in_features, self.columns = in_features, columns
        self.sources: dict[tuple[int, int], _Source] = {}

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """What a file may hold for a matrix, except a bias."""
        return (*self.module_class.tensor_names, "perm", "weight")

    def add(self, name: str, tensor: Tensor, first: int = 0, last: int | None = None) -> None:
        """Take the tensor called ``name`` of the matrix that covers parts ``first`` to ``last`` (all of them).

        Raises:
            CheckpointError: tensors of a matrix do not fit each other or the config.
            UnsupportedLayerError: the matrix cannot be cut where this device's part begins or ends.
        """
        span = (first, len(self.parts) if last is None else last)
        whole = self.parts[first].name if span[1] - first == 1 else self.name
        source = self.sources.setdefault(span, _Source(whole))
        source.tensors[name] = tensor.clone()  # loaders reuse their memory
        if name == "weight" and tensor.numel():
            source.pieces = [self._cut_dense(source, span)]
        elif source.pieces is None and set(self.module_class.tensor_names) <= set(source.tensors):
            source.pieces = self._cut_packed(source, span)

    def _ranges(self, span: tuple[int, int]) -> list[tuple[int, int]]:
        """The needed rows of a matrix that covers the parts of ``span``, as few ranges as possible."""
        ranges: list[tuple[int, int]] = []
        offset = 0
        for part in self.parts[slice(*span)]:
            start, stop = offset + part.start, offset + part.stop
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
            offset += part.rows
        return ranges

    def _rows(self, span: tuple[int, int]) -> int:
        return sum(part.rows for part in self.parts[slice(*span)])

    def _cut_dense(self, source: _Source, span: tuple[int, int]) -> Tensor:
        weight = source.tensors.pop("weight")
        expected = (self._rows(span), self.in_features)
        if tuple(weight.shape) != expected:
            found = tuple(weight.shape)
            raise CheckpointError(f"{source.name}.weight should be {expected}, the checkpoint has {found}")
        rows = torch.cat([weight[slice(*rows)] for rows in self._ranges(span)])
        return rows[:, slice(*self.columns)].to(self.device, self.dtype).contiguous()

    def _cut_packed(self, source: _Source, span: tuple[int, int]) -> list[Matrix | Tensor]:
        tensors = {name: source.tensors.pop(name) for name in self.module_class.tensor_names}
        layout = self.config.layout(self._rows(span), self.in_features, *_names(source.name))
        try:
            self.module_class.empty(layout, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
            self.module_class(layout, tensors).check()
        except CheckpointError as error:
            raise CheckpointError(f"{source.name}: {error}") from error
        pieces: list[Matrix | Tensor] = []
        for rows in self._ranges(span):
            try:
                piece = take_rows(layout, tensors, *rows)
                if self._narrow:
                    piece = take_columns(*piece, *self.columns)
            except ValueError as error:
                raise UnsupportedLayerError(
                    f"{source.name} cannot be split over the devices: {error}. Use another tensor parallel size."
                ) from error
            pieces.append((piece[0], {name: tensor.to(self.device, copy=True) for name, tensor in piece[1].items()}))
        return pieces

    @property
    def _narrow(self) -> bool:
        return self.columns != (0, self.in_features)

    def inputs(self) -> Tensor | None:
        """Which inputs of all devices this one's columns need, int64; None where it needs its own share in order.

        A matrix with columns in an order of their own is split in that order, so that its columns need inputs from
        anywhere. Raises CheckpointError unless the order holds each input once.
        """
        orders = [source.tensors["perm"] for source in self.sources.values() if "perm" in source.tensors]
        if not self._narrow or not orders:
            return None
        try:
            check_perm(orders[0], self.in_features)
        except ValueError as error:
            raise CheckpointError(f"{self.name}: damaged packed layer: {error}") from error
        return orders[0][slice(*self.columns)].to(self.device, torch.int64)

    def has_sentinels(self) -> bool:
        """Whether the empty ``weight`` beside each packed matrix came too.

        An engine that has put a loader of its own on it cuts this layer in a way that is not known here.
        """
        packed = [s for s in self.sources.values() if s.pieces and not isinstance(s.pieces[0], Tensor)]
        return all("weight" in source.tensors for source in packed)

    def all_dense(self) -> bool:
        """Whether none of the matrices is packed. Raises CheckpointError if a tensor did not come."""
        return all(isinstance(piece, Tensor) for piece in self._pieces())

    def modules(self, bias: Tensor | None) -> list[nn.Module]:
        """The layer as modules whose outputs follow each other; ``bias`` is that of all of them. Forgets the tensors.

        Raises:
            CheckpointError: a tensor did not come, or indices in the tensors are not sound.
        """
        groups: list[list[Matrix | Tensor]] = []
        for piece in self._pieces():
            if groups and _fit(groups[-1][-1], piece):
                groups[-1].append(piece)
            else:
                groups.append([piece])
        made: list[nn.Module] = []
        row = 0
        for group in groups:
            rows = sum(_out_features(piece) for piece in group)
            made.append(self._module(group, None if bias is None else bias[row : row + rows]))
            row += rows
        self.sources.clear()  # an engine may keep what refers to this object
        return made

    def _module(self, group: list[Matrix | Tensor], bias: Tensor | None) -> nn.Module:
        if isinstance(group[0], Tensor):
            return make_dense(nn.Linear, torch.cat(group), bias)  # type: ignore[arg-type]
        layout, tensors = join_rows(group)  # type: ignore[arg-type]
        module = self.module_class(layout, tensors, bias, self.dtype, self.config.backend)
        try:
            module.check()
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from error
        return module

    def _pieces(self) -> list[Matrix | Tensor]:
        found: list[Matrix | Tensor] = []
        done = 0
        for span, source in sorted(self.sources.items()):
            if span[0] != done or source.pieces is None:
                break
            found += self._in_order(source)
            done = span[1]
        if done < len(self.parts):
            raise CheckpointError(f"The checkpoint lacks {self.parts[done].name}.packed: it is incomplete or damaged.")
        return found

    def _in_order(self, source: _Source) -> Iterable[Matrix | Tensor]:
        """The pieces of ``source`` with its column order, which may have come after the rest."""
        perm = source.tensors.get("perm")
        for piece in source.pieces or ():
            if isinstance(piece, Tensor):
                yield piece
                continue
            layout, tensors = piece
            check_order(source.name, self.config.stores_order(*_names(source.name)), perm is not None)
            if perm is not None and not self._narrow:
                tensors = {**tensors, "perm": perm.to(self.device)}
            yield layout, tensors


def _fit(above: Matrix | Tensor, below: Matrix | Tensor) -> bool:
    if isinstance(above, Tensor) or isinstance(below, Tensor):
        return isinstance(above, Tensor) and isinstance(below, Tensor)
    return joinable(above, below)


def _out_features(piece: Matrix | Tensor) -> int:
    return piece.shape[0] if isinstance(piece, Tensor) else piece[0].out_features


def _names(name: str) -> set[str]:
    """The names that a layer goes by: overrides may be written for a model with a head or for one without it."""
    return {name, name.removeprefix("model.")}
