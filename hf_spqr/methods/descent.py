"""What error propagation leaves to be gained: coordinate descent over the codes, least squares for the outliers.

Both lower tr((Q - W) H (Q - W)^T) further at no cost in bits: error propagation rounds every column once, knowing only
the columns before it. Tensors are transposed, [K, N], in processing order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_spqr.methods.loop import Grid, State, safe
from hf_spqr.methods.order import Plan, blocks

_ROWS_BUDGET = 2**22


def descend(state: State[Grid], original: Tensor, hessian: Tensor, plan: Plan, bits: int) -> None:
    """One pass of coordinate descent: every code, given all others, is rounded anew to where the loss is least (an
    outlier is moved there exactly). Changes codes, dense and value of `state`.

    original [K, N]: the weight to come close to; hessian [K, K]: damped, positive definite.
    """
    top = 2**bits - 1
    distance = torch.where(state.outlier, state.value, state.dense).sub_(original)
    curvature = hessian.diagonal().tolist()
    grids = iter(state.grids)
    for start, stop, chunks in blocks(plan):
        gradient = hessian[start:stop] @ distance
        for first, last, due, position in chunks:
            grid = next(grids) if due is not None else grid  # noqa: F821  (the first chunk is always due)
            scale, zero = grid.scale[position], grid.zero[position]
            step = safe(scale)
            before = distance[first:last].clone()
            for j in range(first, last):
                wanted = distance[j].sub(gradient[j - start], alpha=1 / curvature[j]).add_(original[j])
                code = (wanted / step).add_(zero).round_().clamp_(0, top)
                dense = (code - zero).mul_(scale)
                outlier = state.outlier[j]
                state.codes[j] = torch.where(outlier, state.codes[j], code.to(torch.uint8))
                state.dense[j] = torch.where(outlier, state.dense[j], dense)
                distance[j] = torch.where(outlier, wanted, dense).sub_(original[j])
                gradient[j + 1 - start : last - start].addr_(hessian[j + 1 : last, j], distance[j] - before[j - first])
            moved = distance[first:last] - before
            gradient[last - start :].addmm_(hessian[last:stop, first:last], moved)
    torch.add(distance, original, out=state.value)


def refit_outliers(state: State[Grid], original: Tensor, hessian: Tensor) -> None:
    """Set all outliers of a row at once to the least-squares optimum given its codes:
    delta_O <- delta_O - H_OO^-1 (H delta)_O with delta = Q - W. Changes `state.value`.

    original [K, N]; hessian [K, K]: damped, positive definite.
    """
    counts = state.outlier.sum(0)
    if not bool(counts.any()):
        return
    distance = torch.where(state.outlier, state.value, state.dense).sub_(original)
    gradient = hessian @ distance
    for rows, width in _rows_by_count(counts):
        # Positions of the outliers of each row, padded by positions that are then made to solve 1 * x = 0.
        mask = state.outlier[:, rows].T
        columns = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        real = mask.gather(1, columns)
        matrix = hessian[columns[:, :, None], columns[:, None, :]]
        pair = real[:, :, None] & real[:, None, :]
        matrix = torch.where(pair, matrix, torch.eye(width, dtype=matrix.dtype, device=matrix.device))
        wanted = torch.where(real, gradient[columns, rows[:, None]], 0.0)
        move = torch.cholesky_solve(wanted[:, :, None], torch.linalg.cholesky(matrix))[:, :, 0]
        state.value[columns, rows[:, None]] -= torch.where(real, move, 0.0)


def _rows_by_count(counts: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows with outliers in batches of similar counts, bounded in memory: (row numbers, largest count)."""
    order = counts.argsort(descending=True)
    order = order[: int((counts > 0).sum())]
    start = 0
    while start < order.numel():
        width = int(counts[order[start]])
        batch = max(1, min(256, _ROWS_BUDGET // width**2))
        yield order[start : start + batch], width
        start += batch
