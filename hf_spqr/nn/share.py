"""What one rank of a tensor-parallel group holds of a packed layer, and what its forward pass does besides.

The ranks divide the rows of a layer (``RowShare``, "colwise" in Transformers' words) or its columns (``ColumnShare``,
"rowwise") as torch divides a dense matrix, so that packed and ordinary layers can stand side by side in a model. What
a rank holds is a packed matrix of its own. Where a cut would go through rows or columns that share statistics, the
ranks on both sides hold them, and each uses only what is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hf_spqr.errors import ConfigError, UnsupportedLayerError
from hf_spqr.formats import affine
from hf_spqr.formats.affine import AffineLayout, AffineWeight
from hf_spqr.formats.panels import ceil_div
from hf_spqr.formats.parts import join_columns, join_rows, shared_columns, take_columns, take_rows
from hf_spqr.formats.tiles import ROWS

__all__ = ["ColumnShare", "RowShare", "Share", "chunk"]

EXTREMES = 2
"""Columns that carry the smallest and the largest value of a token."""


def chunk(total: int, rank: int, size: int, what: str) -> tuple[int, int]:
    """Start and stop of what ``rank`` of ``size`` gets of ``total`` (rows, experts, ...), as ``torch.chunk`` divides.

    Raises ConfigError where a rank would get nothing.
    """
    width = ceil_div(total, size)
    if (size - 1) * width >= total:
        raise ConfigError(
            f"{total} {what} cannot be divided among {size} ranks, at least one would get nothing: use fewer ranks"
        )
    return rank * width, min(total, (rank + 1) * width)


class Share:
    """Base of the two kinds.

    whole: layout of the whole matrix; layout: of what is held. start, stop: the rows or columns of this rank; first,
    last: what is held of the whole.
    """

    layout: Any
    first: int
    last: int

    def __init__(self, whole: Any, total: int, what: str, rank: int, size: int, group: Any) -> None:
        self.whole, self.rank, self.size, self.group = whole, rank, size, group
        self.start, self.stop = chunk(total, rank, size, what)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that are held, from those of the whole matrix."""
        raise NotImplementedError

    def of(self, rank: int) -> Share:
        """What another rank holds."""
        raise NotImplementedError

    def rejoin(self, held: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of the whole matrix, in host memory, from those that the ranks hold: the inverse of `take`."""
        raise NotImplementedError

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are held, by name, as far as they do not depend on the data."""
        return {"packed": self.layout.packed_shape(), "outlier_row": (self.layout.out_features + 1,)}

    def finish(self, module: nn.Module) -> None:
        """Called once when the tensors of ``module`` are in place."""

    def tensors(self, module: Any) -> dict[str, Tensor]:
        """What :meth:`take` gave for ``module``."""
        return module.packed_tensors()

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """The forward pass of ``module`` on this rank."""
        raise NotImplementedError


class RowShare(Share):
    """Some of the rows: the whole input gives some of the outputs."""

    def __init__(self, whole: Any, rank: int, size: int, group: Any) -> None:
        super().__init__(whole, whole.out_features, "rows", rank, size, group)
        self.first = self.start // ROWS * ROWS
        self.last = min(ceil_div(self.stop, ROWS) * ROWS, whole.out_features)
        self.layout = replace(whole, out_features=self.last - self.first)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return take_rows(self.whole, tensors, self.first, self.last)[1]

    def of(self, rank: int) -> RowShare:
        return RowShare(self.whole, rank, self.size, self.group)

    def rejoin(self, held: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        parts, done = [], 0
        for rank, tensors in enumerate(held):
            other = self.of(rank)
            if done < other.last:  # a block of rows that two ranks hold is taken once
                start, stop = max(done, other.first) - other.first, other.last - other.first
                parts.append(take_rows(other.layout, tensors, start, stop))
                done = other.last
        return join_rows(parts)[1]

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        compute = type(module).forward
        if (self.first, self.last) == (self.start, self.stop):
            return compute(module, x)
        bias = module._parameters["bias"]  # has the rows start to stop only
        module._parameters["bias"] = None
        try:
            y = compute(module, x)[..., self.start - self.first : self.stop - self.first]
        finally:
            module._parameters["bias"] = bias
        return y if bias is None else y + bias.to(y.dtype)


class ColumnShare(Share):
    """Some of the columns: some of the inputs give a part of every output, which the ranks add up afterwards.

    ordered: the columns of the whole matrix have an order of their own, so that a group of columns needs inputs from
    all ranks; they exchange their inputs first. act_bits: a token is quantized on the grid of all its values. Two
    columns of weight zero carry its smallest and largest value over all ranks, so that each rank finds that grid.
    """

    def __init__(
        self, whole: Any, rank: int, size: int, group: Any, *, ordered: bool = False, act_bits: int | None = None
    ) -> None:
        super().__init__(whole, whole.in_features, "columns", rank, size, group)
        shared, columns = shared_columns(whole), whole.in_features
        if ordered:
            first, last = chunk(ceil_div(columns, shared), rank, size, "groups of columns")
            self.first, self.last = first * shared, min(last * shared, columns)
        else:
            self.first = self.start // shared * shared
            self.last = min(ceil_div(self.stop, shared) * shared, columns)
        self.ordered, self.quantized = ordered, act_bits is not None
        self.held = replace(whole, in_features=self.last - self.first)
        self.layout = _with_extremes(self.held) if self.quantized else self.held

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        perm = tensors.get("perm")
        plain = {name: tensor for name, tensor in tensors.items() if name != "perm"}
        part = take_columns(self.whole, plain, self.first, self.last)[1]
        if self.quantized:
            part = _add_extremes(self.held, self.layout, part)
        return part if perm is None else {**part, "perm": perm[self.first : self.last].clone()}

    def of(self, rank: int) -> ColumnShare:
        bits = 0 if self.quantized else None  # which bits does not matter for what is held
        return ColumnShare(self.whole, rank, self.size, self.group, ordered=self.ordered, act_bits=bits)

    def rejoin(self, held: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        parts, done = [], 0
        for rank, tensors in enumerate(held):
            other = self.of(rank)
            if done < other.last:
                plain = {name: tensor for name, tensor in tensors.items() if name != "perm"}
                start, stop = max(done, other.first) - other.first, other.last - other.first
                parts.append(take_columns(other.layout, plain, start, stop))
                done = other.last
        whole = join_columns(parts)[1]
        return {**whole, "perm": torch.cat([tensors["perm"] for tensors in held])} if self.ordered else whole

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(), "perm": (self.last - self.first,)}

    def finish(self, module: nn.Module) -> None:
        if self.ordered:
            perm = module._parameters["perm"]
            assert perm is not None
            module._parameters["perm"] = None
            module.register_buffer("columns", perm.detach().long(), persistent=False)

    def tensors(self, module: Any) -> dict[str, Tensor]:
        held = super().tensors(module)
        return {**held, "perm": module.columns.to(torch.int32)} if self.ordered else held

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and x.requires_grad
        if self.quantized and learns:
            raise UnsupportedLayerError(
                "No gradient passes through a tensor-parallel layer whose inputs are quantized: train in one process."
            )
        ends = self._extremes(x) if self.quantized else []
        if self.ordered:
            every = _Gather.apply(x, self) if learns else self._gather(x)
            x = every.index_select(-1, module.columns)  # type: ignore[arg-type]
        else:
            x = F.pad(x, (self.start - self.first, self.last - self.stop))
        if self.quantized:
            x = F.pad(x, (0, self.layout.in_features - EXTREMES - x.shape[-1]))
            x = torch.cat([x, *ends], dim=-1)
        return type(module).forward(module, x)

    def _extremes(self, x: Tensor) -> list[Tensor]:
        """The smallest and the largest value of each token [..., 1] over all ranks."""
        wide = x.float()  # not aminmax: torch 2.10 and 2.11 have no derivative of it
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
        both = torch.cat([-low, high], dim=-1)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        return [-both[..., :1].to(x.dtype), both[..., 1:].to(x.dtype)]

    def _gather(self, x: Tensor) -> Tensor:
        """The inputs of all ranks [..., in_features]."""
        width = ceil_div(self.whole.in_features, self.size)
        mine = F.pad(x, (0, width - x.shape[-1])).contiguous()
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self.group)
        return torch.cat(every, dim=-1)[..., : self.whole.in_features]


class _Gather(torch.autograd.Function):
    """The inputs of all ranks. Every rank uses all of them, so what comes back to one is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: ColumnShare) -> Tensor:
        ctx.share = share
        return share._gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous()
        dist.all_reduce(total, group=ctx.share.group)
        return total[..., ctx.share.start : ctx.share.stop], None


def _with_extremes(layout: AffineLayout) -> AffineLayout:
    """``layout`` with two more columns, in a group of their own where there are groups."""
    columns = layout.in_features if layout.per_channel else layout.groups * layout.group_size
    return replace(layout, in_features=columns + EXTREMES)


def _add_extremes(layout: AffineLayout, wider: AffineLayout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrix with the columns that ``wider`` has more: the last two of weight zero, those before never used."""
    matrix = affine.unpack(layout, dict(tensors))
    codes = F.pad(matrix.codes, (0, wider.in_features - layout.in_features))
    scales, zeros = matrix.scales, matrix.zeros
    if layout.per_channel:
        codes[:, -EXTREMES:] = layout.middle if zeros is None else zeros
    else:
        scales = F.pad(scales, (0, wider.groups - layout.groups))  # a scale of zero makes weights of zero
        zeros = None if zeros is None else F.pad(zeros, (0, wider.groups - layout.groups))
    return affine.pack(AffineWeight(wider, codes, scales, zeros))
