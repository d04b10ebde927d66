"""The second moments of a layer's inputs, gathered batch by batch: the Hessian of its squared output error."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.errors import CalibrationError, NonFiniteError


class HessianAccumulator:
    """H = 2 / T * sum over T tokens of x x^T, for one input that any number of layers share.

    The products of a batch are formed in float32 and summed in float64, ``sum``. Such a sum of n terms is
    exact, whatever its order, as long as the terms of an element differ by less than 2^29 / n in size: so it does not
    matter which process of a group adds what. `hessian()` is float32.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.in_features = in_features
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., K] (any float dtype; leading dimensions are tokens; no tokens is allowed).

        Raises CalibrationError on another width and NonFiniteError on NaN or infinity.
        """
        if inputs.shape[-1] != self.in_features:
            raise CalibrationError(f"Expected inputs of width {self.in_features}, got shape {tuple(inputs.shape)}")
        x = inputs.detach().reshape(-1, self.in_features).to(self.sum.device, torch.float32)
        if x.shape[0] == 0:
            return
        product = x.T @ x
        if not bool(torch.isfinite(product).all()):
            kind = "NaN or infinity" if not bool(torch.isfinite(x).all()) else "values too large to be squared"
            raise NonFiniteError(
                f"The calibration inputs of this layer hold {kind}. Run the model in bfloat16 or float32 instead of"
                " float16, and check its weights and the calibration texts."
            )
        self.sum += product
        self.tokens += x.shape[0]

    @property
    def device(self) -> torch.device:
        return self.sum.device

    def hessian(self) -> Tensor:
        """H [K, K], float32, exactly symmetric. Raises CalibrationError when no token has been added."""
        if self.tokens == 0:
            raise CalibrationError(
                "No calibration input has reached this layer: there is no Hessian to quantize with."
            )
        mean = self.sum.float().mul_(2.0 / self.tokens)
        return (mean + mean.T).mul_(0.5)  # few and narrow temporaries: K x K is the largest thing in memory
