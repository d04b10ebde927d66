"""Times what a prompt costs on a GPU: dense weights made a stretch of rows at a time, and the product with each.

    python benchmarks/prompt_cuda.py [--tokens 128 512 2048] [--mib 16 32 64 96 512]

For SpQR 3 bit with 1 % outliers in fp16: the op as it is, torch's product alone, dequantizing alone, and both by hand
with stretches of at most so many MiB, which is what csrc/cuda/plan.h chooses for the op. Weights are not in the cache
when a call begins. Writes benchmarks/results/prompt_cuda-<gpu>.json.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from kernels_cuda import SHAPES, copies_of, dense_calls, seconds_per_byte, spqr_calls, spqr_tensors, time_graph
from machine import save
from torch import Tensor

from hf_spqr import ops
from hf_spqr.formats.spqr import SpQRLayout

TOKENS = (128, 512, 2048)
MIB = (16, 32, 64, 96, 512)


def stretches(rows: int, columns: int, mib: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows, as even as multiples of 128 allow."""
    most = max(mib * 2**20 // (2 * columns) // 128, 1) * 128
    count = -(-rows // most)
    part = -(-rows // count // 128) * 128
    for first in range(0, rows, part):
        yield first, min(part, rows - first)


def dequantize_rows(layout: SpQRLayout, tensors: tuple[Tensor, ...], first: int, rows: int) -> Tensor:
    packed, outlier_row, outlier = tensors
    numbers = (layout.bits, layout.group_size, layout.stat_bits, layout.second_group)
    blocks = packed[first // 16 : -(-(first + rows) // 16)]
    part = outlier_row[first : first + rows + 1]
    return ops.spqr_dequantize(blocks, part, outlier, None, rows, layout.in_features, *numbers, torch.float16)


def by_hand(layout: SpQRLayout, x: Tensor, mib: int, product: bool) -> list[Callable[[], Any]]:
    made = [spqr_tensors(layout) for _ in range(copies_of(4 * layout.row_blocks * layout.words))]

    def call(tensors: tuple[Tensor, ...]) -> None:
        for first, rows in stretches(layout.out_features, layout.in_features, mib):
            weight = dequantize_rows(layout, tensors, first, rows)
            if product:
                torch.mm(x, weight.T)

    return [partial(call, tensors) for tensors in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--mib", type=int, nargs="+", default=MIB)
    given = parser.parse_args()
    if not ops.COMPILED_CUDA:
        raise SystemExit(f"the CUDA extension is not there: {ops.WHY_NOT.get('_C_cuda')}")
    gpu, per_byte = torch.cuda.get_device_name(), seconds_per_byte()
    results: list[dict[str, Any]] = []

    def time(kind: str, rows: int, columns: int, tokens: int, calls: list[Callable], mib: int | None = None) -> None:
        microseconds = 1e6 * time_graph(calls, replays=10)
        results.append({"kind": kind, "rows": rows, "columns": columns, "tokens": tokens, "mib": mib,
                        "microseconds": microseconds})  # fmt: skip
        print(f"{rows:6} x {columns:6}, {tokens:5} tokens, {kind:24} {mib or '':4} {microseconds:9.1f} us", flush=True)
        name = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()
        save(f"prompt_cuda-{name}", {"gpu": gpu, "bytes_per_second": 1 / per_byte, "results": results})

    for rows, columns in SHAPES:
        layout = SpQRLayout(rows, columns)
        for mib in given.mib:
            x = torch.empty(0, columns, device="cuda", dtype=torch.float16)
            time("dequantize", rows, columns, 0, by_hand(layout, x, mib, product=False), mib)
        for tokens in given.tokens:
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)
            time("torch fp16", rows, columns, tokens, dense_calls(rows, columns, x)[0])
            time("spqr_linear", rows, columns, tokens, spqr_calls(rows, columns, x, layout)[0])
            for mib in given.mib:
                time("dequantize and product", rows, columns, tokens, by_hand(layout, x, mib, product=True), mib)


if __name__ == "__main__":
    main()
