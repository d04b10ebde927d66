"""Times of candidates that are called in turn, each on copies of its weights that no cache holds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
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
ENOUGH = 0.25
"""Share of undisturbed calls from which on only these count."""
SETTLE = 0.1
"""Seconds after which idle threads of other libraries have stopped spinning."""
WAKE = 0.02
"""Seconds in which the system finds processors for threads that were asleep."""
TURNS_AT_A_TIME = 10

Call = Callable[[Any], Any]


def _same(x: Tensor) -> Any:
    return x


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    nbytes: bytes of weights that a call reads. copy: makes a call on weights of its own; asked once for each copy,
    after the number of threads is set. prepare: turns x [tokens, in_features] bfloat16 into what the calls take; not
    timed. threads: whose threads it runs on; candidates with the same ones stand together.
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
    """Calls of each candidate by name, on so many copies that all weights together fill ``total`` bytes.

    Candidates on the same threads, which are called in turn, share what is due to their threads. 2 to MOST_COPIES.
    """
    groups = _groups(candidates)
    found = {}
    for group in groups:
        each = total // len(groups) // len(group)
        for one in group:
            found[one.name] = [one.copy() for _ in range(min(MOST_COPIES, max(2, each // one.nbytes + 1)))]
    return found


@torch.no_grad()
def measure(
    candidates: Sequence[Candidate], x: Tensor, seconds: float, copies: dict[str, list[Call]] | None = None
) -> dict[str, Time]:
    """Median time of a call of each candidate on ``x``; all are called in turn for about ``seconds``.

    In each turn a candidate is called twice, on two copies, and the second call counts: in a model too the layer
    before was of the same kind, so that its code is in the cache, its weights are not.

    Candidates that run on other threads than those before take their turns for themselves, ten at a time. Before
    that there is a pause, in which the other threads fall asleep (they spin for a while and would take processors
    away), and some turns that do not count, in which their own wake up.
    """
    copies = rotating(candidates) if copies is None else copies
    inputs = {c.name: c.prepare(x) for c in candidates}
    samples: dict[str, list[tuple[float, float]]] = {c.name: [] for c in candidates}
    calls = {name: cycle(made) for name, made in copies.items()}
    groups = [[c.name for c in group] for group in _groups(candidates)]
    threads = torch.get_num_threads()

    def turn(names: Sequence[str]) -> dict[str, tuple[float, float]]:
        found = {}
        for name in names:
            given = inputs[name]
            next(calls[name])(given)
            call = next(calls[name])
            busy, wall = time.process_time(), time.perf_counter()
            call(given)
            wall = time.perf_counter() - wall
            found[name] = (wall, (time.process_time() - busy) / wall / threads)
        return found

    for names in groups:
        turn(names)  # whatever a first call sets up
    started, turns = time.perf_counter(), 0
    while time.perf_counter() - started < seconds or turns < LEAST_TURNS:
        for names in groups:
            if len(groups) > 1:
                time.sleep(SETTLE)
                awake = time.perf_counter() + WAKE
                while time.perf_counter() < awake:
                    turn(names)
            for _ in range(TURNS_AT_A_TIME if len(groups) > 1 else 1):
                for name, taken in turn(names).items():
                    samples[name].append(taken)
        turns += 1
    return {name: _time(taken) for name, taken in samples.items()}


def _groups(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    return [list(group) for _, group in groupby(candidates, key=lambda c: c.threads)]


def _time(taken: list[tuple[float, float]]) -> Time:
    clean = [wall for wall, share in taken if share > BUSY]
    chosen = clean if len(clean) >= ENOUGH * len(taken) else [wall for wall, _ in taken]
    return Time(median(chosen), len(taken), len(clean))
