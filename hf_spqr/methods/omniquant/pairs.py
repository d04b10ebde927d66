"""Equivalent transforms (section 3.3) as data: which parameters a scale and a shift touch, and how.

A pair divides a channel where it is made and multiplies it where it is used. Nothing here knows an architecture: the
sites come from :mod:`.propose`, which measures them and keeps only what leaves the block's function unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ScaleSite:
    """Parameter ``param`` is multiplied along ``dim`` by ``scale[index] ** power``.

    index: int64 ``[param.shape[dim]]``, entry of the pair's scale for each position, -1 for a position that is left
        alone; None where position i takes entry i.
    offset: the module uses ``offset + param`` (1 for norms of the kind ``(1 + w)``).
    """

    param: str
    dim: int
    index: Tensor | None
    power: int
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class ShiftSite:
    """A bias that takes the shift: the source's own (``weight`` None) loses it, a consumer's gains ``weight @ shift``.

    index: int64, as in :class:`ScaleSite`, along the bias of a source or along the input of a consumer.
    """

    bias: str
    index: Tensor | None
    weight: str | None = None
    dim: int = 1


@dataclass(frozen=True, eq=False)
class EquivalencePair:
    """One verified transform. kind: "norm", "value", "mlp" or "qk"; size: entries of its scale (and shift)."""

    name: str
    kind: str
    size: int
    scales: tuple[ScaleSite, ...]
    shifts: tuple[ShiftSite, ...] = ()

    @property
    def consumers(self) -> tuple[ScaleSite, ...]:
        """Sites that use the channel (their input is what the transform evens out); of "qk" pairs, the keys."""
        return tuple(site for site in self.scales if site.power == 1)


def _spread(values: Tensor, index: Tensor | None, fill: float) -> Tensor:
    if index is None:
        return values
    return torch.where(index >= 0, values[index.clamp(min=0)], torch.full_like(values[:1], fill))


def apply_pair(
    pair: EquivalencePair, tensors: Mapping[str, Tensor], scale: Tensor, shift: Tensor | None = None
) -> dict[str, Tensor]:
    """New tensors of the parameters that ``pair`` touches, from ``tensors`` (name to value); differentiable.

    scale: positive ``[size]``, by which the source is divided and the consumers are multiplied. shift: ``[size]``,
    subtracted from the source's output before the division; needs ``pair.shifts``.
    Order matters and is that of the paper: shifts see the weights before the scale.
    """
    changed: dict[str, Tensor] = {}
    if shift is not None:
        for place in pair.shifts:
            spread = _spread(shift, place.index, 0.0)
            if place.weight is None:
                changed[place.bias] = tensors[place.bias] - spread
            else:
                weight = tensors[place.weight]
                changed[place.bias] = tensors[place.bias] + (weight @ spread if place.dim == 1 else spread @ weight)
    for site in pair.scales:
        value = changed.get(site.param, tensors[site.param])
        factor = _spread(scale, site.index, 1.0)
        factor = 1 / factor if site.power == -1 else factor
        factor = factor.view([-1 if d == site.dim % value.dim() else 1 for d in range(value.dim())])
        changed[site.param] = (value + site.offset) * factor - site.offset if site.offset else value * factor
    return changed
