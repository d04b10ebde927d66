"""In which order the columns of a layer are quantized, and in which order they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
CHUNK = 32


@dataclass(frozen=True)
class Group:
    """Columns [start, stop), counted in processing order, that share one scale and zero; `index` in stored order."""

    start: int
    stop: int
    index: int


@dataclass(frozen=True)
class Plan:
    """The way of error propagation through a layer.

    columns  int64 [K]: the stored column that is processed at each step
    units    groups that share their second-level statistics, in processing order; the columns of a unit, and of each
             of its groups, are neighbours in processing order
    """

    columns: Tensor
    units: list[list[Group]]


def activation_order(diagonal: Tensor) -> Tensor:
    """Columns by falling diag(H) (SpQR engine and GPTQ: `act_order`), int64 [K]."""
    return torch.argsort(diagonal, descending=True, stable=True)


def plan_in_place(in_features: int, group_size: int, groups_per_unit: int) -> Plan:
    """Quantize the columns as they are stored."""
    return Plan(torch.arange(in_features), _units(in_features, group_size, groups_per_unit))


def plan_by_energy(diagonal: Tensor, group_size: int, groups_per_unit: int) -> Plan:
    """Keep every column in its group, but take the units by falling energy (sum of diag(H)), and within a group the
    columns by falling diag(H): columns that matter most get their errors compensated by all others, as with act_order,
    yet nothing has to be permuted at inference."""
    in_features = diagonal.numel()
    columns: list[Tensor] = []
    units: list[list[Group]] = []
    start = 0
    in_place = _units(in_features, group_size, groups_per_unit)
    energy = torch.stack([diagonal[unit[0].start : unit[-1].stop].sum() for unit in in_place])
    for which in activation_order(energy).tolist():
        unit = []
        for group in in_place[which]:
            inside = activation_order(diagonal[group.start : group.stop])
            columns.append(inside + group.start)
            unit.append(Group(start, start + inside.numel(), group.index))
            start += inside.numel()
        units.append(unit)
    return Plan(torch.cat(columns), units)


def blocks(plan: Plan) -> list[tuple[int, int, list[tuple[int, int, list[Group] | None, int]]]]:
    """Cut the way into blocks of about 128 columns, and these into chunks of at most 32 that lie within one group.

    Returns (start, stop, chunks) per block; a chunk is (start, stop, unit whose statistics are due now or None,
    position of the chunk's group in its unit). A unit begins in a block where all its columns are up to date.
    """
    out: list[tuple[int, int, list[tuple[int, int, list[Group] | None, int]]]] = []
    for unit in plan.units:
        start, stop = unit[0].start, unit[-1].stop
        fits = bool(out) and stop - out[-1][0] <= BLOCK
        due: list[Group] | None = unit
        for position, group in enumerate(unit):
            for first in range(group.start, group.stop, CHUNK):
                last = min(first + CHUNK, group.stop)
                if not out or not (fits or (last - out[-1][0] <= BLOCK and out[-1][0] >= start)):
                    out.append((first, last, []))
                begin, _, chunks = out.pop()
                out.append((begin, last, [*chunks, (first, last, due, position)]))
                due = None
    return out


def _units(in_features: int, group_size: int, groups_per_unit: int) -> list[list[Group]]:
    width = in_features if group_size < 0 else group_size
    groups = [
        Group(start, min(start + width, in_features), index)
        for index, start in enumerate(range(0, in_features, width))
    ]
    return [groups[i : i + groups_per_unit] for i in range(0, len(groups), groups_per_unit)]
