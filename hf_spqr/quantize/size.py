"""How large packed layers are before any outlier, and which bits and groups ``target_bits`` asks for."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_spqr.calibration.blocks import Block
from hf_spqr.config import PackedConfig, SpQRConfig
from hf_spqr.errors import ConfigError
from hf_spqr.nn.dense import features, matrix
from hf_spqr.quantize.budget import TOLERANCE
from hf_spqr.quantize.experts import ExpertsTarget
from hf_spqr.quantize.targets import Target

__all__ = ["Matrices", "Work", "choose", "fixed_bytes", "matrices", "smallest"]

Work = tuple[list[Block], list[Target], list[ExpertsTarget]]
"""A stack of blocks with what is quantized in it."""
FEWEST_BITS, MOST_BITS = 2, 8
GROUPS = (8, 16, 32, 64, 128)
"""Sizes of groups, the dearest first."""


@dataclass(frozen=True)
class Matrices:
    """The ``count`` matrices of ``shape`` (out_features, in_features) that go by one name; nbytes: of all of them."""

    name: str
    shape: tuple[int, int]
    count: int
    nbytes: int

    @property
    def weights(self) -> int:
        return self.count * math.prod(self.shape)


def matrices(stacks: Sequence[Work]) -> list[Matrices]:
    """What is quantized in ``stacks``, as it is now."""
    found = []
    for _, targets, experts in stacks:
        for target in targets:
            found.append(Matrices(target.name, features(target.linear), 1, matrix(target.linear).nbytes))
        for fused in experts:
            for name, shape in fused.projections.items():
                nbytes = fused.kind.view(fused.module, name.rpartition(".")[2]).nbytes
                found.append(Matrices(name, shape, fused.kind.experts, nbytes))
    return found


def fixed_bytes(config: PackedConfig, layers: Sequence[Matrices]) -> int:
    """Bytes of ``layers`` once they are packed, without outliers."""
    total = 0
    for layer in layers:
        order = 4 * layer.shape[1] if config.stores_order(layer.name) else 0
        total += layer.count * (config.layout(*layer.shape, layer.name).fixed_bytes + order)
    return total


def smallest(config: SpQRConfig) -> SpQRConfig:
    """``config`` with the smallest size that it leaves open."""
    return _with(config, config.bits or FEWEST_BITS, config.group_size or GROUPS[-1])


def choose(config: SpQRConfig, stacks: Sequence[Sequence[Matrices]]) -> None:
    """Set what ``config`` leaves open of bits and group size.

    The most bits that fit ``config.target_bits`` in each of ``stacks``, then the smallest groups that fit: outliers
    take what is left. Each of the three buys more than the one after it (docs/spqr.md, "Choosing the size").

    Raises:
        ConfigError: nothing fits.
    """
    target = config.target_bits
    assert target is not None
    all_bits = range(int(min(target, MOST_BITS)), FEWEST_BITS - 1, -1) if config.bits is None else [config.bits]
    groups = GROUPS if config.group_size is None else [config.group_size]
    for bits, group_size in itertools.product(all_bits, groups):
        tried = _with(config, bits, group_size)
        least = max(8 * fixed_bytes(tried, layers) / sum(m.weights for m in layers) for layers in stacks if layers)
        if least * (1 - TOLERANCE) <= target:
            config.bits, config.group_size = bits, group_size
            return
    raise ConfigError(_out_of_reach(config, tried, least))


def _with(config: SpQRConfig, bits: int, group_size: int) -> SpQRConfig:
    changed = copy.copy(config)
    changed.bits, changed.group_size = bits, group_size
    return changed


def _out_of_reach(config: SpQRConfig, tried: SpQRConfig, least: float) -> str:
    given = [name for name in ("bits", "group_size") if getattr(config, name) is not None]
    return (
        f"target_bits={config.target_bits:g} cannot be reached: without outliers the layers take {least:.3f} bits per"
        f" weight with bits={tried.bits}, group_size={tried.group_size}. Set target_bits to at least that"
        + (f", or leave {' and '.join(given)} out, to be chosen for it." if given else ".")
    )
