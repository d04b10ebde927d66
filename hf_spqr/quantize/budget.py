"""``target_bits``: one outlier threshold for the whole model that makes the packed layers as large as asked.

Before the run, every layer's weights are scored once (leave-one-out, without error propagation) and the scores kept as
a histogram: how many outliers any threshold would give. Bisection over the sum of all histograms finds the threshold.
Error propagation makes the true counts differ by some factor, much the same for the same layer of every block; it is
learned as the run goes on and the threshold for the layers that remain is adjusted by it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_spqr.errors import ConfigError
from hf_spqr.methods.base import SpQRParams
from hf_spqr.methods.order import activation_order
from hf_spqr.methods.solve import inverse_factor
from hf_spqr.methods.spqr import absolute_threshold
from hf_spqr.methods.spqr_outliers import leave_one_out

__all__ = ["Budget", "LayerScores", "survey_layer"]

logger = logging.getLogger(__name__)

TOLERANCE = 0.01
MOST_OUTLIERS = 0.2
"""Share of outliers beyond which more bits in the codes are always better."""
FEW = 1e-3
"""Share of outliers that says nothing about the counts to come: 0.03 bits per weight."""
LOWEST, HIGHEST, BINS = -10.0, 10.0, 640
"""Thresholds from 2^-10 to 2^10 in steps of 2^(1/32)."""


@dataclass(frozen=True)
class LayerScores:
    """How many outliers a layer has at any threshold.

    name; weights: number of them; fixed_bytes: size without outliers; outlier_bytes: size of one; above: number of
    scores above each of the BINS + 1 thresholds of the grid; own: a threshold of its own, from the config, that stays.
    """

    name: str
    weights: int
    fixed_bytes: int
    outlier_bytes: int
    above: list[int]
    own: float | None = None

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]

    def count(self, threshold: float) -> float:
        """Outliers at ``threshold``, interpolated between the grid points."""
        if self.own is not None:
            threshold = self.own
        if threshold == math.inf:
            return 0.0
        position = (math.log2(threshold) - LOWEST) / (HIGHEST - LOWEST) * BINS
        position = min(max(position, 0.0), BINS - 1e-6)
        low = int(position)
        a, b = self.above[low], self.above[low + 1]
        return a + (b - a) * (position - low)


@torch.no_grad()
def survey_layer(
    name: str, weights: Sequence[Tensor], hessian: Tensor, params: SpQRParams, *, fixed: bool
) -> LayerScores:
    """Score one layer, or the same layer of all experts, [N, K] each, for inputs with Hessian [K, K].

    ``fixed``: it keeps the threshold in ``params``. Raises what the factorization of the Hessian raises.
    """
    rows, columns = weights[0].shape
    layout = params.layout(rows, columns)
    diagonal = hessian.diagonal()
    perm = activation_order(diagonal) if params.permutes else torch.arange(columns, device=diagonal.device)
    factor = inverse_factor(hessian[perm][:, perm], params.damping)
    cost = factor.upper.diagonal().square().reciprocal()[:, None]
    histogram = torch.zeros(BINS + 2, dtype=torch.int64)
    size = columns if params.group_size < 0 else params.group_size
    for weight in weights:
        work = weight.float().T[perm]
        unit = absolute_threshold(work, factor.upper, 1.0)
        for start in range(0, columns, size):
            part = slice(start, start + size)
            score = leave_one_out(work[part], cost[part], 2**params.bits - 1).div_(unit).clamp_min_(2.0**LOWEST / 2)
            bins = ((score.log2() - LOWEST) * (BINS / (HIGHEST - LOWEST))).floor_().clamp_(-1, BINS).long() + 1
            histogram += torch.bincount(bins.flatten().cpu(), minlength=BINS + 2)
    above = histogram.flip(0).cumsum(0).flip(0)[1:].tolist()
    fixed_bytes = layout.fixed_bytes + (4 * columns if params.permutes else 0)
    own = params.outlier_threshold if fixed else None
    many = len(weights)
    return LayerScores(name, many * rows * columns, many * fixed_bytes, layout.outlier_dtype.itemsize, above, own)


@dataclass
class Budget:
    """Spends ``target_bits`` per weight over the layers of a model."""

    target_bits: float
    layers: dict[str, LayerScores] = field(default_factory=dict)
    factors: dict[str, tuple[float, float]] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)
    left: float = 0.0
    first: float = 0.0

    def add(self, layer: LayerScores) -> None:
        """Take in the scores of a layer."""
        self.layers[layer.name] = layer

    def start(self) -> None:
        """Choose the threshold.

        Raises:
            ConfigError: no threshold can give the target.
        """
        self.left = self.target_bits / 8 * sum(layer.weights for layer in self.layers.values())
        weights = sum(layer.weights for layer in self.layers.values())
        least = 8 * self._size(2.0**HIGHEST) / weights
        most = least + 8 * MOST_OUTLIERS * max(layer.outlier_bytes for layer in self.layers.values())
        if not least * (1 - TOLERANCE) <= self.target_bits <= most:
            raise ConfigError(
                f"target_bits={self.target_bits:g} cannot be reached with these bits, groups and statistics: without"
                f" outliers the layers take {least:.3f} bits per weight, and {most:.2f} would be outliers everywhere."
                " Change bits or group_size, or the target."
            )
        self.first = self._bisect()
        logger.info("target_bits=%g: outlier_threshold=%.4g", self.target_bits, self.first)

    def threshold(self, name: str) -> float:
        """The threshold for the layer called ``name``, which is quantized next."""
        own = self.layers[name].own
        if own is not None:
            return own
        if name not in self.used:  # the experts of a layer are asked for one by one
            self.used[name] = self._bisect()
        return self.used[name]

    def spend(self, name: str, outliers: int, nbytes: int) -> None:
        """The layer called ``name`` is done: it has so many outliers and takes so many bytes."""
        layer = self.layers.pop(name)
        self.left -= nbytes
        expected = layer.count(self.used.get(name, math.inf))
        for kind in (layer.kind, ""):
            true, predicted = self.factors.get(kind, (0.0, 0.0))
            self.factors[kind] = (true + outliers, predicted + expected)

    def chosen(self) -> float:
        """The threshold of the model: the mean of those of its layers, on a logarithmic scale."""
        return math.exp(sum(map(math.log, self.used.values())) / len(self.used)) if self.used else self.first

    def summary(self, codes: str, bits: float) -> str:
        """What was chosen and what came out, in words; ``codes``: what was chosen besides."""
        used = self.used.values()
        spread = f" (per layer {min(used):.4g} to {max(used):.4g})" if used else ""
        text = (
            f"target_bits={self.target_bits:g}: {codes}, outlier_threshold={self.chosen():.4g}{spread}"
            f" gives {bits:.3f} bits."
        )
        if abs(bits / self.target_bits - 1) > TOLERANCE:
            text += " That is more than 1 % off the target: the model is too small to correct it."
            logger.warning(text)
        else:
            logger.info(text)
        return text

    def _factor(self, layer: LayerScores) -> float:
        """True count over predicted count, as far as it is known: near 1 while hardly any were predicted."""
        few = FEW * layer.weights
        for kind in (layer.kind, ""):
            true, predicted = self.factors.get(kind, (0.0, 0.0))
            if predicted > 0:
                return (true + few) / (predicted + few)
        return 1.0

    def _size(self, threshold: float) -> float:
        return sum(
            layer.fixed_bytes + layer.outlier_bytes * layer.count(threshold) * self._factor(layer)
            for layer in self.layers.values()
        )

    def _bisect(self) -> float:
        low, high = LOWEST, HIGHEST
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._size(2.0**middle) > self.left else (low, middle)
        return 2.0**high
