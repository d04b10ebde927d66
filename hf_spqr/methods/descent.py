"""What error propagation leaves to be gained: coordinate descent over codes and outliers.

It lowers tr((Q - W) H (Q - W)^T) at no cost in bits: error propagation rounds every column once, knowing only the
columns before it. Tensors are transposed, [K, N], in processing order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.methods.loop import GridT, State, safe
from hf_spqr.methods.order import Plan, blocks


def descend(state: State[GridT], original: Tensor, hessian: Tensor, plan: Plan, bits: int) -> None:
    """One pass of coordinate descent: every code, given all others, is rounded anew to where the loss is least; an
    outlier is moved there exactly. Changes codes, dense, value and loss of `state`.

    original [K, N]: the weight to come close to; hessian [K, K]: damped, positive definite.
    """
    top = 2**bits - 1
    distance = state.quantized().sub_(original)
    curvature = hessian.diagonal().tolist()
    rows, current = distance.shape[1], -1
    for start, stop, chunks in blocks(plan):
        at_first, before = hessian[start:stop] @ distance, distance[start:stop].clone()
        gradient = at_first.clone()
        for first, last, due, position in chunks:
            current += due is not None
            grid = state.grids[current]
            scale, zero = grid.scale[position, :rows], grid.zero[position, :rows]
            step = safe(scale)
            for j in range(first, last):
                slope, here, dense = gradient[j - start], distance[j], state.dense[j]
                value = torch.add(here, original[j]).sub_(slope, alpha=1 / curvature[j])
                code = (value / step).add_(zero).round_().clamp_(0, top)
                state.codes[j] = code
                torch.mul(code.sub_(zero), scale, out=dense)
                torch.sub(torch.where(state.outlier[j], value, dense), original[j], out=here)
                if j + 1 < last:
                    moved = here - before[j - start]
                    gradient[j + 1 - start : last - start].addr_(hessian[j, j + 1 : last], moved)
            if last < stop:
                moved = distance[first:last] - before[first - start : last - start]
                gradient[last - start :].addmm_(hessian[last:stop, first:last], moved)
        moved = distance[start:stop] - before
        state.loss += at_first.mul_(2).addmm_(hessian[start:stop, start:stop], moved).mul_(moved).sum(0)
    torch.add(distance, original, out=state.value)
