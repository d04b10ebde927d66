"""The learned side of the equivalent transforms: scales and shifts of the pairs of one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .pairs import EquivalencePair, apply_pair

MIN_DIRECT = 1e-2  # the original keeps |scale| above this
LOG_LIMIT = 12.0  # exp(12) = 1.6e5: beyond what any float16 activation needs


class Transforms(nn.Module):
    """Scale (and shift, where the pair has one) of each pair, all starting at the identity.

    log: learn the logarithm of the scale, which keeps it positive; otherwise the scale itself, as published.
    """

    def __init__(self, pairs: Sequence[EquivalencePair], device: torch.device, log: bool, shift: bool) -> None:
        super().__init__()
        self.pairs, self.log = list(pairs), log
        start = torch.zeros if log else torch.ones
        self.scales = nn.ParameterList([nn.Parameter(start(pair.size, device=device)) for pair in pairs])
        self.shifts = nn.ParameterDict(
            {
                str(i): nn.Parameter(torch.zeros(p.size, device=device))
                for i, p in enumerate(pairs)
                if shift and p.shifts
            }
        )

    def scale(self, number: int) -> Tensor:
        """Positive scale of pair ``number``."""
        value = self.scales[number]
        return value.clamp(-LOG_LIMIT, LOG_LIMIT).exp() if self.log else value.clamp(min=MIN_DIRECT)

    def shift(self, number: int) -> Tensor | None:
        key = str(number)
        return self.shifts[key] if key in self.shifts else None

    @torch.no_grad()
    def set_scale(self, number: int, scale: Tensor) -> None:
        self.scales[number].copy_(scale.log() if self.log else scale)

    @torch.no_grad()
    def set_shift(self, number: int, shift: Tensor) -> None:
        if self.shift(number) is not None:
            self.shifts[str(number)].copy_(shift)

    def forward(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that change, of a block whose tensors are ``tensors``."""
        merged, changed = dict(tensors), {}
        for number, pair in enumerate(self.pairs):
            new = apply_pair(pair, merged, self.scale(number), self.shift(number))
            changed.update(new)
            merged.update(new)
        return changed


class ChannelStatistics:
    """Range and mean centre of each input channel of some modules, gathered over calibration."""

    def __init__(self) -> None:
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}
        self.centres: dict[str, list[Tensor]] = {}

    def see(self, name: str, x: Tensor) -> None:
        low, high = torch.aminmax(x.float().flatten(0, -2), dim=0)
        self.low[name] = torch.minimum(self.low.get(name, low), low)
        self.high[name] = torch.maximum(self.high.get(name, high), high)
        self.centres.setdefault(name, []).append((low + high) / 2)

    def centre(self, name: str) -> Tensor:
        return torch.stack(self.centres[name]).mean(0)

    def peak(self, name: str, centre: Tensor | float = 0.0) -> Tensor:
        """Largest distance of each channel from ``centre``."""
        return torch.maximum(self.high[name] - centre, centre - self.low[name])


def consumer_modules(pairs: Sequence[EquivalencePair]) -> list[str]:
    """Names of the modules whose inputs the pairs even out."""
    sites = [site.param for pair in pairs if pair.kind != "qk" for site in pair.consumers]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in sites))


@torch.no_grad()
def start_scales(
    transforms: Transforms, tensors: Mapping[str, Tensor], statistics: ChannelStatistics, alpha: float
) -> None:
    """Set the scales to ``act ** alpha / weight ** (1 - alpha)`` (SmoothQuant) over all consumers; shifts to the
    centre.

    "qk" pairs start at 1. Everything is computed from the untransformed ``tensors``.
    """
    for number, pair in enumerate(transforms.pairs):
        if pair.kind == "qk":
            continue
        act = torch.zeros(pair.size, device=transforms.scales[number].device)
        weight, centre = torch.zeros_like(act), torch.zeros_like(act)
        for site in pair.consumers:
            module = site.param.rpartition(".")[0]
            if module not in statistics.low:
                continue
            index = torch.arange(pair.size, device=act.device) if site.index is None else site.index
            value = tensors[site.param].abs().movedim(site.dim, 0).flatten(1).amax(1)
            weight.scatter_reduce_(0, index, value, "amax")
            if transforms.shift(number) is not None:
                centre.scatter_reduce_(0, index, statistics.centre(module), "mean", include_self=False)
            act.scatter_reduce_(0, index, statistics.peak(module, centre[index]), "amax")
        scale = act.clamp(min=1e-5).pow(alpha) / weight.clamp(min=1e-5).pow(1 - alpha)
        scale = torch.where((act <= 0) | (weight <= 0), torch.ones_like(scale), scale)
        transforms.set_scale(number, scale.clamp(1e-4, 1e4))
        transforms.set_shift(number, centre)
