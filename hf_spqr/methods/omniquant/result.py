"""What quantizing one block returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hf_spqr.formats.affine import AffineWeight


@dataclass
class BlockResult:
    """A quantized block.

    weights: packed-format weights by linear name. folded: new values, in the checkpoint's dtype, of the other
    parameters that equivalent transforms changed (norms, biases, routers), by parameter name inside the block. pairs:
    names of the transforms in use; rejected: proposals that did not verify.
    loss_initial, loss_final: squared error, in the metric of the loss, of the block's output against the
    full-precision chain, on the samples kept out of training (on all samples where none were), before training and
    with exactly the stored tensors; loss_nearest: the same for rounding to nearest without transforms. loss_final
    never exceeds loss_initial.
    losses: training loss of each step. skipped: steps dropped for a non-finite loss or gradient. kept_initial:
    training did not help and the starting point was stored.
    outputs_fp, outputs_q: outputs ``[S, T, H]`` of the full-precision and the quantized stream, inputs of the next
    block.
    """

    weights: dict[str, AffineWeight]
    folded: dict[str, Tensor]
    pairs: list[str]
    rejected: list[str]
    loss_nearest: float
    loss_initial: float
    loss_final: float
    kept_initial: bool
    skipped: int
    outputs_fp: Tensor
    outputs_q: Tensor
    losses: list[float] = field(default_factory=list)
