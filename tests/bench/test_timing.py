"""Candidates are called in turn, each on every copy of its weights; disturbed calls are left out if they can be."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_spqr import ops
from hf_spqr.bench import timing
from hf_spqr.bench.timing import Candidate, dense, measure, module, plain_read, rotating

X = torch.ones(1, 8)


def recording(name: str, called: list[tuple[str, int]], nbytes: int = 100, threads: str = "torch") -> Candidate:
    made = iter(range(1000))

    def copy() -> Callable[[Any], Any]:
        number = next(made)
        return lambda x: called.append((name, number))

    return Candidate(name, nbytes, copy, threads=threads)


def test_in_turn_and_on_each_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, int]] = []
    both = [recording("a", called), recording("b", called)]
    found = measure(both, X, 0, rotating(both, total=600))
    turns = called[4:]  # after a turn to set up
    assert [name for name, _ in turns] == ["a", "a", "b", "b"] * timing.LEAST_TURNS
    assert [number for name, number in turns if name == "a"] == [2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
    assert found["a"].calls == timing.LEAST_TURNS and found["a"].seconds > 0


def test_as_many_copies_as_fill_the_bytes() -> None:
    found = rotating([recording("a", [], 100), recording("b", [], 10**9), recording("c", [], 1)], total=3000)
    assert {name: len(calls) for name, calls in found.items()} == {"a": 11, "b": 2, "c": timing.MOST_COPIES}


def test_other_threads_take_turns_of_their_own_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, int]] = []
    slept: list[float] = []
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    monkeypatch.setattr(timing, "WAKE", 1e-9)
    monkeypatch.setattr(timing, "TURNS_AT_A_TIME", 2)
    three = [recording("a", called), recording("b", called, threads="own"), recording("c", called, threads="own")]
    copies = rotating(three, total=600)
    assert {name: len(calls) for name, calls in copies.items()} == {"a": 4, "b": 2, "c": 2}
    found = measure(three, X, 0, copies)
    turns = "".join(name for name, _ in called[6:])
    assert re.fullmatch("((aa){2,}(bbcc){2,})+", turns)
    assert slept == [timing.SETTLE] * 2 * timing.LEAST_TURNS
    assert found["b"].calls == 2 * timing.LEAST_TURNS  # those before it was awake do not count


def test_disturbed_calls_are_left_out_where_enough_others_remain() -> None:
    quiet, disturbed = [(1.0, 0.99)] * 10, [(9.0, 0.3)] * 30
    assert timing._time(quiet + disturbed) == timing.Time(1.0, 40, 10)
    assert timing._time(quiet[1:] + disturbed).seconds == 9.0


def test_a_module_is_copied() -> None:
    layer = torch.nn.Linear(8, 4)
    call = module("layer", layer, 1).copy()
    assert torch.equal(call(X), layer(X))
    layer.weight.data.zero_()
    assert not torch.equal(call(X), layer(X))


def test_dense_takes_its_own_dtype() -> None:
    candidate = dense(4, 8, torch.float32)
    assert candidate.name == "torch fp32" and candidate.nbytes == 128
    assert candidate.copy()(candidate.prepare(X.bfloat16())).dtype == torch.float32


@pytest.mark.skipif(not ops.COMPILED, reason="needs the compiled kernels")
def test_plain_read() -> None:
    assert measure([plain_read(1 << 16)], X, 0)["read"].seconds > 0
