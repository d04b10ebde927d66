"""What every method shares: parameters, the result, checks of the inputs, and the layer error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_spqr.errors import ConfigError, NonFiniteError
from hf_spqr.formats.affine import AffineLayout, AffineWeight
from hf_spqr.formats.panels import GROUP_SIZES
from hf_spqr.formats.spqr import SpQRLayout, SpQRWeight


@dataclass(frozen=True)
class SpQRParams:
    """Parameters of SpQR for one layer.

    bits                2..8, width of the weight codes
    group_size          inputs that share one scale and zero (8, 16, 32, 64, 128; -1 = the whole row)
    scale_bits,
    zero_bits           2..8, widths of the codes of the scales and zeros themselves
    second_group        16 or 32 scales share one second level: 16 rows times 1 or 2 neighbouring groups
    outlier_threshold   tau: a weight is kept in 16 bit when that lowers the squared error by more than tau times the
                        mean over inputs of var(W_j) / U_jj^2, with U^T U the inverse of the damped H; smaller = more
                        outliers, inf = none
    act_order           store the columns in the order of falling activation energy (needs a gather of x at inference)
                        None: the mode's choice, False by default and True in the reference
    percdamp            damping of H as a share of its mean diagonal; None: 0.03, in the reference 1.0
    mode                "default", or "reference" = the published engine in every choice
    """

    bits: int = 3
    group_size: int = 16
    scale_bits: int = 3
    zero_bits: int = 3
    second_group: int = 16
    outlier_threshold: float = 0.2
    act_order: bool | None = None
    percdamp: float | None = None
    mode: str = "default"

    def __post_init__(self) -> None:
        if self.mode not in ("default", "reference"):
            raise ConfigError(f'mode must be "default" or "reference", got {self.mode!r}')
        _check_common(self.bits, self.group_size, self.damping)
        for name in ("scale_bits", "zero_bits"):
            if not 2 <= getattr(self, name) <= 8:
                raise ConfigError(f"{name} must be 2..8, got {getattr(self, name)}")
        if self.second_group not in (16, 32):
            raise ConfigError(f"second_group must be 16 or 32, got {self.second_group}")
        if not self.outlier_threshold > 0:
            raise ConfigError(f"outlier_threshold must be > 0 (inf for no outliers), got {self.outlier_threshold}")

    @property
    def reference(self) -> bool:
        return self.mode == "reference"

    @property
    def permutes(self) -> bool:
        """Whether the columns are stored in activation order: `act_order`, or the mode's choice."""
        return self.reference if self.act_order is None else self.act_order

    @property
    def damping(self) -> float:
        """`percdamp`, or the mode's choice."""
        if self.percdamp is None:
            return 1.0 if self.reference else 0.03
        return self.percdamp

    def layout(self, out_features: int, in_features: int) -> SpQRLayout:
        """The packed layout of a layer [out_features, in_features]."""
        return SpQRLayout(
            out_features,
            in_features,
            bits=self.bits,
            group_size=self.group_size,
            stat_bits=max(self.scale_bits, self.zero_bits),
            second_group=self.second_group,
        )


@dataclass(frozen=True)
class AffineParams:
    """Parameters of RTN and GPTQ: w = scale * (code - zero) with 16-bit scales and integer zeros per group."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    act_order: bool = False
    percdamp: float = 0.01
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        _check_common(self.bits, self.group_size, self.percdamp)
        if self.scale_dtype not in (torch.float16, torch.bfloat16):
            raise ConfigError(f"scale_dtype must be torch.float16 or torch.bfloat16, got {self.scale_dtype}")

    @classmethod
    def of(cls, layout: AffineLayout) -> AffineParams:
        """Parameters of a layer that is to be stored in ``layout``, without a permutation."""
        return cls(layout.bits, layout.group_size, symmetric=layout.symmetric, scale_dtype=layout.scale_dtype)

    def layout(self, out_features: int, in_features: int) -> AffineLayout:
        """The packed layout of a layer [out_features, in_features]."""
        return AffineLayout(out_features, in_features, self.bits, self.group_size, self.symmetric, self.scale_dtype)


@dataclass
class LayerResult:
    """A quantized layer.

    error     sqrt(tr(dW H dW^T) / tr(W H W^T)) with the undamped H: the relative error of the layer's output on the
              calibration data (without a Hessian: of the weight)
    percdamp  the damping that was used; `damping_raised` when it is not the asked one (Cholesky had failed)
    outliers  number of weights kept in 16 bit
    """

    weight: SpQRWeight | AffineWeight
    error: float
    percdamp: float = 0.0
    damping_raised: bool = False
    outliers: int = 0


def check_inputs(weight: Tensor, hessian: Tensor | None) -> None:
    """Raise ValueError on wrong shapes and NonFiniteError, naming the tensor, on NaN or infinity."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise ConfigError(f"weight must be a non-empty [out_features, in_features] matrix, got {tuple(weight.shape)}")
    _check_finite(weight, "weight")
    if hessian is None:
        return
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ConfigError(
            f"hessian must be [{weight.shape[1]}, {weight.shape[1]}] for this weight, got {tuple(hessian.shape)}"
        )
    _check_finite(hessian, "Hessian")


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor | None) -> float:
    """sqrt(tr(dW H dW^T) / tr(W H W^T)); 0 when both vanish, inf when only the denominator does."""
    difference = quantized - weight
    if hessian is None:
        spent, total = float(difference.square().sum()), float(weight.square().sum())
    else:
        spent, total = output_energy(difference, hessian), output_energy(weight, hessian)
    return energy_ratio(spent, total)


def output_energy(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H W^T) for W [N, K]: the squared norm of the layer's output over the calibration data.

    H is symmetric, so that of the blocks beside its diagonal only one half is multiplied.
    """
    size = weight.shape[1]
    if size <= 256:
        return float(((weight @ hessian) * weight).sum())
    half = size // 2
    left, right = weight[:, :half], weight[:, half:]
    across = float(((left @ hessian[:half, half:]) * right).sum())
    return output_energy(left, hessian[:half, :half]) + 2 * across + output_energy(right, hessian[half:, half:])


def energy_ratio(spent: float, total: float) -> float:
    """sqrt(spent / total), with 0 / 0 = 0 and tiny negative rounding counted as 0."""
    spent = max(spent, 0.0)
    if total <= 0:
        return 0.0 if spent == 0 else math.inf
    return math.sqrt(spent / total)


def _check_common(bits: int, group_size: int, percdamp: float) -> None:
    if not 2 <= bits <= 8:
        raise ConfigError(f"bits must be 2..8, got {bits}")
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"group_size must be one of {GROUP_SIZES} (-1: one group per row), got {group_size}")
    if not (percdamp >= 0 and math.isfinite(percdamp)):
        raise ConfigError(f"percdamp must be a finite number >= 0, got {percdamp}")


def _check_finite(tensor: Tensor, name: str) -> None:
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            f"The {name} has {int(bad.sum())} NaN or infinite values (first at {where}). Check the checkpoint and, for"
            " a Hessian, the calibration inputs; a float16 model that overflows should be calibrated in bfloat16 or"
            " float32."
        )
