"""Times of candidates that are called in turn, each on copies of its weights that no cache holds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Candidate", "Time", "dense", "measure", "module", "plain_read", "rotating"]

ROTATE_BYTES = 1 << 30
"""Bytes of all copies together, well above any cache: a model comes back to a layer only after all the others."""
MOST_COPIES = 256
LEAST_TURNS = 5
BUSY = 0.9
"""Share of its threads' time for which a process must have had a processor for a call to count as undisturbed."""
ENOUGH = 10
SETTLE = 0.04
"""Seconds after which idle threads of other libraries have stopped spinning."""

Call = Callable[[Any], Any]


def _same(x: Tensor) -> Any:
    return x


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    nbytes: bytes of weights that a call reads. copy: makes a call on weights of its own; asked once for each copy,
    after the number of threads is set. prepare: turns x [tokens, in_features] bfloat16 into what the calls take; not
    timed. threads: whose threads it runs on.
    """

    name: str
    nbytes: int
    copy: Callable[[], Call]
    prepare: Callable[[Tensor], Any] = _same
    threads: str = "torch"


@dataclass(frozen=True)
class Time:
    """seconds: median of a call. calls: how many there were. clean: how many undisturbed."""

    seconds: float
    calls: int
    clean: int


def module(name: str, layer: nn.Module, nbytes: int) -> Candidate:
    """A layer as a model calls it."""
    return Candidate(name, nbytes, lambda: copy.deepcopy(layer))


def dense(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> Candidate:
    """torch's own ``nn.Linear``."""
    layer = nn.Linear(columns, rows, bias=False, dtype=dtype, device=device).requires_grad_(False)
    name = {torch.bfloat16: "torch bf16", torch.float32: "torch fp32", torch.float16: "torch fp16"}[dtype]
    return Candidate(name, layer.weight.nbytes, lambda: copy.deepcopy(layer), lambda x: x.to(dtype))


def plain_read(nbytes: int) -> Candidate:
    """Reading memory on all threads, by the widest loads there are: the bandwidth that kernels are held against."""
    data = torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32)

    def make() -> Call:
        own = data.clone()
        return lambda x: torch.ops.hf_spqr.read_memory(own)

    return Candidate("read", data.nbytes, make)


def rotating(candidates: Sequence[Candidate], total: int = ROTATE_BYTES) -> dict[str, list[Call]]:
    """Calls of each candidate by name, so many that their weights together fill ``total`` bytes; 2 to MOST_COPIES."""
    each = total // max(1, len(candidates))
    return {c.name: [c.copy() for _ in range(min(MOST_COPIES, max(2, each // c.nbytes + 1)))] for c in candidates}


@torch.no_grad()
def measure(
    candidates: Sequence[Candidate], x: Tensor, seconds: float, copies: dict[str, list[Call]] | None = None
) -> dict[str, Time]:
    """Median time of a call of each candidate on ``x``; all are called in turn for about ``seconds``.

    Before a candidate that runs on other threads than the one before it, there is a pause, in which those fall asleep
    (they spin for a while and would take processors away), and a call that does not count.
    """
    copies = rotating(candidates) if copies is None else copies
    inputs = {c.name: c.prepare(x) for c in candidates}
    pools = [c.threads for c in candidates]
    starts = {c.name for c, before in zip(candidates, pools[-1:] + pools[:-1], strict=True) if c.threads != before}
    samples: dict[str, list[tuple[float, float]]] = {c.name: [] for c in candidates}
    for name, calls in copies.items():
        for call in calls[:2]:
            call(inputs[name])  # whatever a first call sets up
    endless = {name: cycle(calls) for name, calls in copies.items()}
    threads, started, turn = torch.get_num_threads(), time.perf_counter(), 0
    while time.perf_counter() - started < seconds or turn < LEAST_TURNS:
        for name, given in inputs.items():
            if name in starts:
                time.sleep(SETTLE)
                next(endless[name])(given)
            call = next(endless[name])
            busy, wall = time.process_time(), time.perf_counter()
            call(given)
            wall = time.perf_counter() - wall
            samples[name].append((wall, (time.process_time() - busy) / wall / threads))
        turn += 1
    return {name: _time(taken) for name, taken in samples.items()}


def _time(taken: list[tuple[float, float]]) -> Time:
    clean = [wall for wall, share in taken if share > BUSY]
    chosen = clean if len(clean) >= ENOUGH else [wall for wall, _ in taken]
    return Time(median(chosen), len(taken), len(clean))
