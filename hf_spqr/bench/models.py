"""What measured layers mean for whole models: bytes, memory and expected tokens per second of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["COMMON", "Estimate", "ModelShape", "Speed", "estimate"]

DENSE_BYTES = 2
"""Of a weight that is not packed, in bfloat16."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder of Llama's kind: attention with grouped heads, gate, up and down projections."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    attention: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together, and of all value heads."""
    vocabulary: int
    tied: bool

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers of the decoder, which are packed."""
        attention = 2 * self.hidden * self.attention + 2 * self.hidden * self.key_value
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the output layer, which stays dense."""
        return self.vocabulary * self.hidden

    def weight_bytes(self, bits: float) -> float:
        """Of the whole model with linear layers of so many bits per weight; norms are not counted."""
        dense = self.head_weights * (1 if self.tied else 2)
        return self.linear_weights * bits / 8 + dense * DENSE_BYTES


COMMON = (
    ModelShape("1B", 2048, 8192, 16, 2048, 512, 128256, True),
    ModelShape("3B", 3072, 8192, 28, 3072, 1024, 128256, True),
    ModelShape("8B", 4096, 14336, 32, 4096, 1024, 128256, False),
    ModelShape("14B", 5120, 17408, 40, 5120, 1024, 151936, False),
    ModelShape("32B", 5120, 25600, 64, 8192, 1024, 151936, False),
    ModelShape("70B", 8192, 28672, 80, 8192, 1024, 128256, False),
)
"""Llama 3.2 1B and 3B, Llama 3.1 8B, Qwen3 14B and 32B, Llama 3.1 70B."""


@dataclass(frozen=True)
class Speed:
    """How fast one kind of layer is at batch 1: its bits per weight, and bytes of weights per second."""

    name: str
    bits: float
    bytes_per_second: float


@dataclass(frozen=True)
class Estimate:
    """One model with one kind of layer. fits: its weights are smaller than the memory that was free."""

    model: str
    kind: str
    weight_bytes: float
    fits: bool
    tokens_per_second: float


def estimate(
    models: Sequence[ModelShape], speeds: Sequence[Speed], dense: Speed, seconds_per_layer: float, free_bytes: int
) -> list[Estimate]:
    """Expected decoding of one sequence with a short context, for each model and kind of layer.

    A token reads the linear layers at the speed of their kind and the output layer at that of ``dense``; everything
    else in a layer (attention, norms, Python) takes ``seconds_per_layer``, measured or 0.
    """
    found = []
    for model in models:
        head = model.head_weights * DENSE_BYTES / dense.bytes_per_second
        for speed in speeds:
            linear = model.linear_weights * speed.bits / 8 / speed.bytes_per_second
            size = model.weight_bytes(speed.bits)
            seconds = linear + head + model.layers * seconds_per_layer
            found.append(Estimate(model.name, speed.name, size, size < free_bytes, 1 / seconds))
    return found
