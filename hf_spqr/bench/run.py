"""What ``hf-spqr bench`` measures on a machine."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from hf_spqr.bench import cuda, weights
from hf_spqr.bench.models import COMMON, Speed, estimate
from hf_spqr.bench.timing import Candidate, dense, measure, module, plain_read, rotating

__all__ = ["Kind", "Row", "free_memory", "measure_layers", "model_estimates", "seconds_per_layer"]

ROTATE_CUDA = 240 << 20
"""Bytes of all copies of one candidate, at least twice the L2 cache of the largest GPUs."""
DENSE = "torch bf16"


@dataclass(frozen=True)
class Kind:
    """A kind of packed layer. method: "spqr" or "affine". outliers: share of weights kept in 16 bit, of spqr.

    backend: as in the configs.
    """

    method: str
    bits: int
    group_size: int
    outliers: float = 0.0
    backend: str = "auto"

    @property
    def name(self) -> str:
        text = f"{self.method} {self.bits} bit g{self.group_size}"
        text += f" {self.outliers:.1%} outliers" if self.outliers else ""
        return text if self.backend == "auto" else f"{text} {self.backend}"

    def layer(self, rows: int, columns: int, device: str) -> Any:
        """A layer of random weights."""
        sizes = {"bits": self.bits, "group_size": self.group_size, "device": device}
        layer: Any
        if self.method == "spqr":
            layer = weights.spqr_linear(rows, columns, outliers=self.outliers, **sizes)  # type: ignore[arg-type]
        else:
            layer = weights.affine_linear(rows, columns, **sizes)  # type: ignore[arg-type]
        layer.backend = self.backend
        return layer


@dataclass(frozen=True)
class Row:
    """One layer at one number of tokens. bytes_per_second: of its weights; limit: what plain reading reached."""

    shape: tuple[int, int]
    tokens: int
    name: str
    bits_per_weight: float
    seconds: float
    bytes_per_second: float
    limit_bytes_per_second: float
    times_bf16: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_layers(
    kinds: Sequence[Kind],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    device: str,
    seconds: float,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Times of each kind and of torch's bfloat16, with the bandwidth of memory measured in the same run.

    seconds: for each shape and number of tokens, on the CPU. on_row: called with settings done and all of them.
    """
    with nullcontext() if device == "cpu" else torch.cuda.device(device):
        return _measure_layers(kinds, shapes, tokens, device, seconds, on_row)


def _measure_layers(
    kinds: Sequence[Kind],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    device: str,
    seconds: float,
    on_row: Callable[[int, int], None],
) -> list[Row]:
    limit = 1 / cuda.seconds_per_byte() if device != "cpu" else 0.0
    rows: list[Row] = []
    for at, (n, k) in enumerate(shapes):
        found = [dense(n, k, torch.bfloat16, device)]
        for kind in kinds:
            layer = kind.layer(n, k, device)
            found.append(module(kind.name, layer, layer.nbytes()))
        read: list[Candidate] = [plain_read(n * k // 2)] if device == "cpu" else []
        copies = rotating(read + found) if device == "cpu" else rotating(found, ROTATE_CUDA * len(found))
        for number, count in enumerate(tokens):
            x = torch.randn(count, k, device=device, dtype=torch.bfloat16)
            timed = measure(read + found, x, seconds, copies) if read else cuda.measure(found, x, copies)
            if read:
                limit = read[0].nbytes / timed["read"].seconds
            for candidate in found:
                took = timed[candidate.name].seconds
                bits = 8 * candidate.nbytes / n / k
                speed = candidate.nbytes / took
                ratio = timed[DENSE].seconds / took
                rows.append(Row((n, k), count, candidate.name, bits, took, speed, limit, ratio))
            on_row(at * len(tokens) + number + 1, len(shapes) * len(tokens))
    return rows


def model_estimates(rows: Sequence[Row], per_layer: float, free: int) -> list[dict[str, Any]]:
    """:func:`hf_spqr.bench.models.estimate` of all common models from the rows of batch 1."""
    speeds = []
    for name in dict.fromkeys(row.name for row in rows):
        one = [row for row in rows if row.name == name and row.tokens == 1]
        weight_count = sum(row.shape[0] * row.shape[1] for row in one)
        nbytes = sum(row.bits_per_weight / 8 * row.shape[0] * row.shape[1] for row in one)
        speeds.append(Speed(name, 8 * nbytes / weight_count, nbytes / sum(row.seconds for row in one)))
    plain = next(speed for speed in speeds if speed.name == DENSE)
    return [asdict(one) for one in estimate(COMMON, speeds, plain, per_layer, free)]


@torch.no_grad()
def seconds_per_layer(repeats: int = 20) -> float:
    """What transformers takes for a Llama layer beside its matrices, one token on the CPU: that of a narrow one."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=1, dtype="bfloat16",
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval().bfloat16()
    less = copy.deepcopy(model)
    less.model.layers = less.model.layers[:4]
    times: dict[int, list[float]] = {8: [], 4: []}
    for _ in range(repeats):
        for layers, one in ((8, model), (4, less)):
            cache = DynamicCache(config=config)
            one(torch.ones(1, 32, dtype=torch.int64), None, None, cache, use_cache=True)
            start = time.perf_counter()
            one(torch.ones(1, 1, dtype=torch.int64), None, None, cache, use_cache=True)
            times[layers].append(time.perf_counter() - start)
    return max(0.0, (median(times[8]) - median(times[4])) / 4)


def free_memory(device: str) -> int:
    """Bytes that a model could take now."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as info:
            return next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
