"""Times the CUDA kernels beside torch's dense matrix product, from GPU memory.

    python benchmarks/kernels_cuda.py [--quick] [--tokens 1 8 64] [--kinds "torch bf16|spqr"]

Each time is the median over replays of a CUDA graph, per call. Within a graph every call takes another copy of the
weights, together more than the L2 cache holds, because a decoding model too comes back to a layer only after all the
others. The byte limit is what a call must read and write, at the bandwidth that this run measured for an elementwise
kernel.
Writes benchmarks/results/kernels_cuda-<gpu>.json.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import torch
from machine import save
from torch import Tensor

from hf_spqr import ops
from hf_spqr.bench.cuda import seconds_per_byte, time_graph
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
ROTATE_BYTES = 240 << 20  # at least twice the L2 cache of the largest GPUs
OUTLIERS = 0.01


def copies_of(nbytes: int) -> int:
    return max(2, -(-ROTATE_BYTES // nbytes))


def random_words(shape: tuple[int, int]) -> Tensor:
    """Any words are a valid matrix, and time does not depend on them."""
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64, device="cuda").to(torch.int32)


def spqr_tensors(layout: SpQRLayout) -> tuple[Tensor, Tensor, Tensor]:
    """packed, outlier_row and outlier of a random matrix."""
    rows, columns = layout.out_features, layout.in_features
    per_row = round(OUTLIERS * columns)
    row = torch.arange(rows + 1, dtype=torch.int32, device="cuda") * per_row
    column = torch.rand(rows, columns, device="cuda").topk(per_row, dim=1).indices.sort(dim=1).values.flatten()
    return random_words(layout.packed_shape()), row, (column.to(torch.int32) | (0x2000 << 16)).contiguous()


def spqr_calls(rows: int, columns: int, x: Tensor, layout: SpQRLayout) -> tuple[list[Callable], int]:
    packed, *outliers = spqr_tensors(layout)
    nbytes = sum(tensor.nbytes for tensor in (packed, *outliers))
    numbers = (layout.bits, layout.group_size, layout.stat_bits, layout.second_group)
    calls = []
    for _ in range(copies_of(nbytes)):
        tensors = (random_words(layout.packed_shape()), *(tensor.clone() for tensor in outliers), None)
        calls.append(lambda t=tensors: ops.spqr_linear(x, *t, None, rows, *numbers))
    return calls, nbytes


def affine_calls(rows: int, x: Tensor, layout: AffineLayout) -> tuple[list[Callable], int]:
    nbytes = 4 * layout.row_blocks * layout.words
    numbers = (layout.bits, layout.group_size, layout.symmetric, False)
    weights = [random_words(layout.packed_shape()) for _ in range(copies_of(nbytes))]
    return [lambda w=w: ops.affine_linear(x, w, None, None, rows, *numbers) for w in weights], nbytes


def dense_calls(rows: int, columns: int, x: Tensor) -> tuple[list[Callable], int]:
    nbytes = 2 * rows * columns
    weights = [torch.randn(rows, columns, device="cuda", dtype=x.dtype) for _ in range(copies_of(nbytes))]
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights], nbytes


def integer_calls(
    rows: int, x: Tensor, layout: AffineLayout, act_bits: int, quantize: bool
) -> tuple[list[Callable], int]:
    """The linear on integers, with or without the quantization of ``x`` before it."""
    nbytes = 4 * layout.row_blocks * layout.words
    numbers = (layout.bits, layout.group_size, layout.symmetric, False, x.dtype)
    weights = [random_words(layout.packed_shape()) for _ in range(copies_of(nbytes))]
    codes = ops.quantize_activation(x, None, act_bits, False)

    def call(weight: Tensor) -> Tensor:
        given = ops.quantize_activation(x, None, act_bits, False) if quantize else codes
        return ops.w_int8_linear(*given, weight, None, rows, *numbers, act_bits)

    return [lambda w=w: call(w) for w in weights], nbytes


def int_mm_calls(rows: int, columns: int, tokens: int) -> tuple[list[Callable], int]:
    """torch's product of int8 matrices, which gives int32: neither scales nor zero points."""
    x = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8, device="cuda")
    weights = [
        torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device="cuda")
        for _ in range(copies_of(rows * columns))
    ]
    return [lambda w=w: torch._int_mm(x, w.T) for w in weights], rows * columns


def integer_kinds(rows: int, columns: int, x: Tensor) -> dict[str, Callable[[], tuple[list[Callable], int]]]:
    def maker(bits: int, act_bits: int, group: int, quantize: bool) -> Callable:
        return lambda: integer_calls(rows, x, AffineLayout(rows, columns, bits, group), act_bits, quantize)

    found = {
        "W8A8, linear only": maker(8, 8, -1, False),
        "W8A8": maker(8, 8, -1, True),
        "W6A6": maker(6, 6, -1, True),
        "W4A4": maker(4, 4, -1, True),
        "W4A8 g128": maker(4, 8, 128, True),
    }
    if x.shape[0] > 16:  # torch's takes no fewer
        found["torch int8 (_int_mm)"] = lambda: int_mm_calls(rows, columns, x.shape[0])
    return found


def kinds(rows: int, columns: int, x: Tensor, x_half: Tensor) -> dict[str, Callable[[], tuple[list[Callable], int]]]:
    """Name -> maker of calls, so that only one set of weights lives at a time."""
    return {
        "torch bf16": lambda: dense_calls(rows, columns, x),
        "torch fp16": lambda: dense_calls(rows, columns, x_half),
        "spqr 3 bit, bf16": lambda: spqr_calls(rows, columns, x, SpQRLayout(rows, columns)),
        "spqr 3 bit, fp16": lambda: spqr_calls(rows, columns, x_half, SpQRLayout(rows, columns)),
        "affine 4 bit g128, fp16": lambda: affine_calls(rows, x_half, AffineLayout(rows, columns, 4, 128)),
        "affine 4 bit g128, bf16": lambda: affine_calls(rows, x, AffineLayout(rows, columns, 4, 128)),
        "affine 3 bit g128, fp16": lambda: affine_calls(rows, x_half, AffineLayout(rows, columns, 3, 128)),
        "affine 2 bit g64, fp16": lambda: affine_calls(rows, x_half, AffineLayout(rows, columns, 2, 64)),
        **integer_kinds(rows, columns, x),
    }


def save_results(gpu: str, per_byte: float, rows_of_table: list[dict[str, Any]], ending: str) -> Any:
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()
    result = {"gpu": gpu, "cuda": torch.version.cuda, "bytes_per_second": 1 / per_byte, "results": rows_of_table}
    return save(f"kernels_cuda-{name}{ending}", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, few batch sizes")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default {' '.join(map(str, TOKENS))}")
    parser.add_argument("--ending", default="", help="of the name of the results' file")
    parser.add_argument("--kinds", default="", help="a regular expression: only kinds in which it is found")
    given = parser.parse_args()
    quick = given.quick
    if not ops.COMPILED_CUDA:
        raise SystemExit(f"the CUDA extension is not there: {ops.WHY_NOT.get('_C_cuda')}")
    gpu = torch.cuda.get_device_name()
    per_byte = seconds_per_byte()
    print(f"{gpu}: memory moves {1e-12 / per_byte:.2f} TB/s")
    rows_of_table = []
    for rows, columns in SHAPES[:2] if quick else SHAPES:
        for tokens in given.tokens or ((1, 8, 16, 64, 2048) if quick else TOKENS):
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            for name, make in kinds(rows, columns, x, x.half()).items():
                if not re.search(given.kinds, name):
                    continue
                calls, nbytes = make()
                seconds = time_graph(calls)
                limit = per_byte * (nbytes + 2 * tokens * (rows + columns))
                entry = {"rows": rows, "columns": columns, "tokens": tokens, "kind": name, "weight_bytes": nbytes,
                         "microseconds": 1e6 * seconds, "of_byte_limit": limit / seconds}  # fmt: skip
                rows_of_table.append(entry)
                print(f"{rows:6} x {columns:6}, {tokens:5} tokens, {name:26} {1e6 * seconds:9.2f} us "
                      f"{100 * limit / seconds:5.1f} % of the byte limit", flush=True)  # fmt: skip
                del calls, make
            save_results(gpu, per_byte, rows_of_table, given.ending)  # what there is, should the rest not be reached
    print(save_results(gpu, per_byte, rows_of_table, given.ending))


if __name__ == "__main__":
    main()
