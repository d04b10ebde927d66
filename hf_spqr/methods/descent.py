"""What error propagation leaves to be gained: coordinate descent over the codes, least squares for the outliers.

Both lower tr((Q - W) H (Q - W)^T) further at no cost in bits: error propagation rounds every column once, knowing only
the columns before it. Tensors are transposed, [K, N], in processing order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_spqr.methods.loop import GridT, State, safe
from hf_spqr.methods.order import Plan, blocks

_BATCH_FLOATS = 2**22


def descend(state: State[GridT], original: Tensor, hessian: Tensor, plan: Plan, bits: int) -> None:
    """One pass of coordinate descent: every code, given all others, is rounded anew to where the loss is least; an
    outlier is moved there exactly. Changes codes, dense and value of `state`.

    original [K, N]: the weight to come close to; hessian [K, K]: damped, positive definite.
    """
    top = 2**bits - 1
    distance = torch.where(state.outlier, state.value, state.dense).sub_(original)
    curvature = hessian.diagonal().tolist()
    current = -1
    for start, stop, chunks in blocks(plan):
        gradient = hessian[start:stop] @ distance
        for first, last, due, position in chunks:
            current += due is not None
            grid, rows = state.grids[current], distance.shape[1]
            scale, zero = grid.scale[position, :rows], grid.zero[position, :rows]
            step = safe(scale)
            before = distance[first:last].clone()
            for j in range(first, last):
                slope, here, dense = gradient[j - start], distance[j], state.dense[j]
                value = torch.add(here, original[j]).sub_(slope, alpha=1 / curvature[j])
                code = (value / step).add_(zero).round_().clamp_(0, top)
                state.codes[j] = code
                torch.mul(code.sub_(zero), scale, out=dense)
                torch.sub(torch.where(state.outlier[j], value, dense), original[j], out=here)
                if j + 1 < last:
                    moved = here - before[j - first]
                    gradient[j + 1 - start : last - start].addr_(hessian[j, j + 1 : last], moved)
            if last < stop:
                gradient[last - start :].addmm_(hessian[last:stop, first:last], distance[first:last] - before)
    torch.add(distance, original, out=state.value)


def refit_outliers(state: State[GridT], original: Tensor, hessian: Tensor, damping: float) -> float:
    """Set all outliers of a row at once to the least-squares optimum given the row's codes:
    delta_O <- delta_O - (H_OO + damping I)^-1 ((H + damping I) delta)_O with delta = Q - W. Changes `state.value`.

    original [K, N]; hessian [K, K], undamped. Returns tr(delta H delta^T) after the move, over all N columns.
    """
    distance = torch.where(state.outlier, state.value, state.dense).sub_(original)
    gradient = hessian @ distance
    energy = (gradient * distance).sum()
    counts = state.outlier.sum(0)
    row, column = state.outlier.T.nonzero(as_tuple=True)
    starts = counts.cumsum(0) - counts
    place = torch.arange(row.numel(), device=row.device) - starts[row]
    table = row.new_full((counts.numel(), int(counts.max())), -1)
    table[row, place] = column
    for rows, width in _rows_by_count(counts):
        columns = table[rows, :width]
        real = columns >= 0
        columns.clamp_(min=0)
        # Rows with fewer outliers than the batch is wide are padded with unknowns of their own that come out as 0.
        pair = real[:, :, None] & real[:, None, :]
        curvature = torch.where(pair, hessian[columns[:, :, None], columns[:, None, :]], 0.0)
        matrix = curvature.clone()
        matrix.diagonal(dim1=1, dim2=2).add_(torch.where(real, damping, 1.0))
        slope = torch.where(real, gradient[columns, rows[:, None]], 0.0)
        wanted = slope + damping * torch.where(real, distance[columns, rows[:, None]], 0.0)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        move = -torch.cholesky_solve(wanted[:, :, None], factor)[:, :, 0]
        move = torch.where(real & (failed == 0)[:, None], move, 0.0)
        energy += (move * (2 * slope + (curvature @ move[:, :, None])[:, :, 0])).sum()
        state.value[columns[real], rows[:, None].expand_as(columns)[real]] += move[real]
    return float(energy)


def _rows_by_count(counts: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows with outliers in batches of similar counts, bounded in memory: (row numbers, largest count)."""
    order = counts.argsort(descending=True)
    order = order[: int((counts > 0).sum())]
    start = 0
    while start < order.numel():
        width = int(counts[order[start]])
        batch = max(1, min(256, _BATCH_FLOATS // width**2))
        yield order[start : start + batch], width
        start += batch
