"""The processes of a torch.distributed group that quantize a model together; one process alone has nothing to say.

Every rank runs the same steps. Calibration batches are divided in contiguous runs, so that joining what the ranks
have, in their order, gives what one process would have. Layers are divided by cost: their owners quantize them and
give the result to all. What fails on one rank is raised on all at the end of the step, so that none waits for ever.

All that is exchanged goes through host memory by gloo, whatever the backend of the default group is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from hf_spqr.calibration.hessian import HessianAccumulator
from hf_spqr.errors import CalibrationError, HfSpqrError, RankError

__all__ = ["Ranks"]

T = TypeVar("T")

PATIENCE = timedelta(hours=24)
"""How long a rank waits for the others: a layer, or a block of OmniQuant, may take its owner long."""


class Ranks:
    """The default process group, where there is one. All ranks have to make this at the same point of the program."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._group: Any = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and shows."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step of all ranks: an exception of one is raised on every rank when all have come to the end of it.

        The rank that failed raises its own exception, the others RankError. Nothing in the step may wait for another
        rank.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        text = None if error is None else f"{type(error).__name__}: {error}"
        failed = [(rank, text) for rank, text in enumerate(self._gather(text)) if text is not None]
        if error is None and failed:
            error = RankError(f"rank {failed[0][0]}: {failed[0][1]}")
        if error is not None:
            if isinstance(error, HfSpqrError):
                error.everywhere = self.size > 1
            raise error

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0, on every rank."""
        value = None
        with self.together():
            value = make() if self.first else None
        if self.size == 1:
            return value  # type: ignore[return-value]
        box = [value]
        self._call(dist.broadcast_object_list, box, src=0)
        return box[0]  # type: ignore[return-value]

    def part(self, items: Sequence[T]) -> list[T]:
        """The run of ``items`` that is this rank's. Raises CalibrationError where there are fewer than ranks."""
        if len(items) < self.size:
            raise CalibrationError(
                f"{self.size} processes need at least as many calibration batches, and the data gives {len(items)}."
                " Use fewer processes, or more data (nsamples, seqlen)."
            )
        start, stop = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return list(items[start:stop])

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """A rank for each name, so that the sums of their ``costs`` are about equal."""
        load, owners = [0.0] * self.size, {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            owners[name] = min(range(self.size), key=lambda rank: load[rank])
            load[owners[name]] += costs[name]
        return owners

    def exchange(self, mine: dict[Any, T]) -> dict[Any, T]:
        """What all ranks have, joined; everybody's keys differ. Tensors should be in host memory."""
        joined: dict[Any, T] = {}
        for part in self._gather(mine):
            joined |= part
        return joined

    def join(self, mine: list[T]) -> list[T]:
        """The lists of all ranks one after another."""
        return [item for part in self._gather(mine) for item in part]

    def add(self, tensor: Tensor, to: set[int] | None = None) -> Tensor:
        """The sum of ``tensor`` over the ranks; only those in ``to`` (all, if None) get it, the others get rubbish."""
        if self.size == 1:
            return tensor
        here = tensor.cpu()
        if to is not None and len(to) == 1:
            self._call(dist.reduce, here, dst=next(iter(to)))
        else:
            self._call(dist.all_reduce, here)
        return here.to(tensor.device)

    def add_moments(self, moments: HessianAccumulator, to: set[int]) -> None:
        """Add up the moments that the ranks have gathered for the same input; ``to`` need them."""
        moments.sum = self.add(moments.sum, to)
        moments.tokens = sum(self._gather(moments.tokens))

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _gather(self, value: T) -> list[T]:
        if self.size == 1:
            return [value]
        every: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, every, value)
        return every

    def _call(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            collective(*args, group=self._group, **kwargs)
        except RuntimeError as error:
            raise RankError(f"another process is gone or does not answer; see its own message ({error})") from error
