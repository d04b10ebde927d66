"""The factor of the inverse Hessian that error propagation needs, with damping that always ends in a solution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_spqr.errors import CalibrationError

_LADDER_STEPS = 12


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular `upper` [K, K] with `upper.T @ upper` = (H + damping * I)^-1.

    `percdamp` is the damping that was used, as a share of mean(diag(H)); `raised` says that it had to be raised
    above the asked one because the matrix was not numerically positive definite.
    """

    upper: Tensor
    percdamp: float
    raised: bool


def damped(hessian: Tensor, percdamp: float) -> Tensor:
    """Return H + percdamp * mean(diag(H)) * I as a new matrix; where the diagonal is 0 (dead inputs) it becomes 1 at
    percdamp 0, so that the matrix stays invertible (SpQR engine: `H[dead, dead] = 1`)."""
    out = hessian.clone()
    diagonal = out.diagonal()
    dead = diagonal == 0
    diagonal += percdamp * float(diagonal.mean())
    diagonal[dead] = torch.where(diagonal[dead] > 0, diagonal[dead], torch.ones_like(diagonal[dead]))
    return out


def inverse_factor(hessian: Tensor, percdamp: float) -> InverseFactor:
    """Factor the inverse of the damped Hessian ([K, K], float32 or float64, symmetric positive semidefinite).

    When Cholesky fails the damping is raised tenfold (from at least 1e-6) and tried again.
    Raises CalibrationError when the matrix cannot be made positive definite that way (it is then not a Hessian).
    """
    asked = percdamp
    for _ in range(_LADDER_STEPS):
        # H = R R^T with R upper triangular is the Cholesky factor of H read backwards; then R^-1 is the factor sought.
        lower, info = torch.linalg.cholesky_ex(damped(hessian, percdamp).flip(0, 1))
        if int(info) == 0 and bool((lower.diagonal() > 0).all()):
            upper = invert_upper(lower.flip(0, 1))
            if bool(torch.isfinite(upper).all()):
                return InverseFactor(upper, percdamp, raised=percdamp != asked)
        percdamp = max(10 * percdamp, 1e-6)
    raise CalibrationError(
        f"The Hessian is not positive definite even with damping {percdamp / 10:g} of its mean diagonal: it cannot"
        " come from X^T X. Check the calibration inputs for huge values, or give more calibration data."
    )


def invert_upper(matrix: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix, by halves (so that nearly all of the work is matrix products)."""
    size = matrix.shape[0]
    if size <= 64:
        return torch.linalg.solve_triangular(
            matrix, torch.eye(size, dtype=matrix.dtype, device=matrix.device), upper=True
        )
    half = size // 2
    out = torch.zeros_like(matrix, memory_format=torch.contiguous_format)
    out[:half, :half] = invert_upper(matrix[:half, :half])
    out[half:, half:] = invert_upper(matrix[half:, half:])
    out[:half, half:] = -(out[:half, :half] @ (matrix[:half, half:] @ out[half:, half:]))
    return out
