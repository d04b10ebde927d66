"""Times on a GPU: replayed graphs, so that no launch is counted that a compiled model would not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from hf_spqr.bench.timing import Call, Candidate, Time

__all__ = ["measure", "seconds_per_byte", "time_graph"]

REPLAYS = 20


def time_graph(calls: Sequence[Callable[[], Any]], replays: int = REPLAYS) -> float:
    """Median seconds per call, of calls captured into one CUDA graph."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return median(times[3:])


def seconds_per_byte() -> float:
    """Of bytes read and written by an elementwise kernel over much more than the cache. (A copy inside of a graph is a
    memcpy, which reached only two thirds of this on an H200.)"""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return time_graph([lambda: torch.add(source, 1.0, out=target)]) / (8 * source.numel())


@torch.no_grad()
def measure(candidates: Sequence[Candidate], x: torch.Tensor, copies: dict[str, list[Call]]) -> dict[str, Time]:
    """Median time of a call of each candidate on ``x``; each call of a graph is on another copy of the weights."""
    found = {}
    for candidate in candidates:
        given = candidate.prepare(x)
        calls = [lambda call=call, given=given: call(given) for call in copies[candidate.name]]
        found[candidate.name] = Time(time_graph(calls), REPLAYS, REPLAYS)
    return found
