"""Hyper-parameters of OmniQuant (arXiv 2308.13137) and of the learned-rounding default that goes past it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from hf_spqr.errors import ConfigError
from hf_spqr.formats.affine import AffineLayout

PAIR_KINDS = ("norm", "value", "mlp", "qk")


@dataclass(frozen=True)
class OmniQuantParams:
    """Everything that decides how one block is quantized.

    bits: weight bits, 2 to 8. group_size: columns that share a scale, -1 for one scale per output channel.
    act_bits: bits of the dynamic per-token activations (input of every quantized Linear, and q, k, v of attention),
        None for weight-only.
    sym: symmetric weights (zero point fixed at ``2 ** (bits - 1)``).
    lwc: learn the quantization grid of the weights. With ``rounding=False`` this is the paper's clipping (section
        3.2): sigmoid of two factors on the minimum and maximum of each group; with ``rounding=True`` it is a
        logarithmic scale and a zero-point offset for each group.
    let: learn equivalent transforms (section 3.3); None means "when activations are quantized".
    let_pairs: which kinds of pair may be used: "norm" (norm to consumers), "value" (v to o), "mlp" (up to down),
        "qk" (q against k).
    let_alpha: migration strengths tried for the starting scale ``act ** a / weight ** (1 - a)``; the one with the
        lowest block error is taken.
    let_log: learn the logarithm of the transform's scale (else the scale itself, as published).
    rounding: learn the rounding of every weight (an offset in units of the grid step).
    rounding_range: bound of that offset, in steps; 0.5 only chooses between the two neighbours.
    epochs, batch_size: passes over the training samples, and samples in a step.
    lwc_lr, let_lr, rounding_lr: Adam's learning rates. cosine: decay them to a twentieth along half a cosine.
    shuffle: draw the batches in random order. aug_loss: add the distance to the full-precision block fed with the
        quantized stream (the original's ``--aug_loss``).
    fisher: measure the block's error in the metric that :func:`quantize_block` is given, which takes a pass back
        through the model; else, and as published, by its mean square.
    holdout: share of the samples kept out of training, on which the best state is chosen; 0 keeps the last state (and
        guards it on the training samples).
    quantize_attention: with act_bits, also quantize q, k and v where they enter attention.
    act_sym: the grid of a token is symmetric around 0; else it spans its minimum and maximum.
    zero_grad: let the gradient pass the rounding of the zero point (the original stops it).
    scale_dtype: 16-bit type in which scales are stored; training sees the stored value.
    autocast: run blocks under bfloat16 autocast instead of float32. seed: of batches, splits and pair checks.
    """

    bits: int = 4
    group_size: int = -1
    act_bits: int | None = None
    sym: bool = False
    lwc: bool = True
    let: bool | None = None
    let_pairs: tuple[str, ...] = PAIR_KINDS
    let_alpha: tuple[float, ...] = (0.5, 0.65, 0.8)
    let_log: bool = True
    rounding: bool = True
    rounding_range: float = 0.5
    epochs: int = 10
    batch_size: int = 4
    lwc_lr: float = 1e-2
    let_lr: float = 5e-3
    rounding_lr: float = 1e-2
    cosine: bool = True
    shuffle: bool = True
    aug_loss: bool = False
    fisher: bool = True
    holdout: float = 0.125
    quantize_attention: bool = True
    act_sym: bool = False
    zero_grad: bool = True
    scale_dtype: torch.dtype = torch.float16
    autocast: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise ConfigError(f"{field.name} must be True or False, got {value!r}")
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"bits must be 2 to 8, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigError(f"group_size must be positive, or -1 for one scale per channel, got {self.group_size}")
        if self.act_bits is not None and not 2 <= self.act_bits <= 8:
            raise ConfigError(f"act_bits must be 2 to 8, or None for weight-only, got {self.act_bits}")
        if self.act_sym and self.act_bits is None:
            raise ConfigError("act_sym is about quantized activations: set act_bits, or leave act_sym out")
        if self.act_bits is not None and self.group_size != -1:
            raise ConfigError("quantized activations need weights with one scale per channel: set group_size=-1")
        if self.epochs < 0 or self.batch_size < 1:
            raise ConfigError(f"epochs must be >= 0 and batch_size >= 1, got {self.epochs} and {self.batch_size}")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout is a share of the samples, 0 <= holdout < 1, got {self.holdout}")
        if self.scale_dtype not in (torch.float16, torch.bfloat16):
            raise ConfigError(f"scale_dtype must be torch.float16 or torch.bfloat16, got {self.scale_dtype}")
        if unknown := set(self.let_pairs) - set(PAIR_KINDS):
            raise ConfigError(f"unknown let_pairs {sorted(unknown)}; choose from {PAIR_KINDS}")
        if self.transforms and not self.let_alpha:
            raise ConfigError("let_alpha needs at least one migration strength, for example (0.5,)")

    @property
    def transforms(self) -> bool:
        """Whether equivalent transforms are used."""
        return self.act_bits is not None if self.let is None else self.let

    def layout(self, out_features: int, in_features: int) -> AffineLayout:
        """The packed layout of a layer [out_features, in_features]."""
        return AffineLayout(out_features, in_features, self.bits, self.group_size, self.sym, self.scale_dtype)
