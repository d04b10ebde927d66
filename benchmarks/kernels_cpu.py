"""Times the CPU kernels beside torch's bf16, fp32 and 4-bit products, and holds them against the memory's bandwidth.

    python benchmarks/kernels_cpu.py [--quick] [--threads 1 2] [--tokens 1 16 128 512]

All candidates of a setting are called in turn, each time on the next copy of its weights; together the copies exceed
1 GB, so that none comes from a cache, as in a decoding model. The plain read of memory is one of the candidates.
Times are medians over calls in which the process had the processor (at least nine tenths of its threads' time), where
there are ten such calls, else over all calls; `clean` counts them. "of read" is a kernel's packed bytes per second
over what the plain read reached. Writes benchmarks/results/kernels_cpu-<processor>.json.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from machine import machine, save
from torch import Tensor

from hf_spqr import ops
from hf_spqr.formats import affine, spqr
from hf_spqr.formats.columns import nbytes

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))
ROTATE_BYTES = 1 << 30
OUTLIERS = 0.01
Call = Callable[[Tensor], Any]


def random_codes(bits: int, rows: int, columns: int) -> Tensor:
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)


def random_spqr(n: int, k: int, bits: int, outliers: float) -> tuple[Call, int, list[Tensor]]:
    layout = spqr.SpQRLayout(n, k, bits, 16)
    per_row = torch.binomial(torch.full((n,), float(k)), torch.full((n,), float(outliers))).int()
    column = torch.cat([torch.randperm(k)[:count].sort().values for count in per_row.tolist()])
    second = (
        torch.tensor([0.002, -3.0, 0.7, -1.0]) * torch.empty(layout.row_blocks, layout.second_groups, 4).uniform_()
    )
    weight = spqr.SpQRWeight(
        layout,
        random_codes(bits, n, k),
        random_codes(3, n, layout.groups),
        random_codes(3, n, layout.groups),
        second.half(),
        torch.cat([torch.zeros(1, dtype=torch.int32), per_row.cumsum(0).int()]),
        column.int(),
        torch.randn(len(column)).mul(0.05).half(),
    )
    packed = spqr.pack(weight)

    def call(x: Tensor, tensors: list[Tensor]) -> Tensor:
        return ops.spqr_linear(x, *tensors, None, None, n, bits, 16, 3, 16)

    return call, nbytes(packed), [packed["packed"], packed["outlier_row"], packed["outlier"]]


def random_affine(n: int, k: int, bits: int, group: int) -> tuple[Call, int, list[Tensor]]:
    layout = affine.AffineLayout(n, k, bits, group)
    scales = torch.empty(n, layout.groups).uniform_(0.001, 0.02).half()
    weight = affine.AffineWeight(layout, random_codes(bits, n, k), scales, random_codes(bits, n, layout.groups))
    packed = affine.pack(weight)

    def call(x: Tensor, tensors: list[Tensor]) -> Tensor:
        return ops.affine_linear(x, *tensors, None, None, n, bits, group, False, False)

    return call, nbytes(packed), [packed["packed"]]


def torch_dense(n: int, k: int, dtype: torch.dtype) -> tuple[Call, int, list[Tensor]]:
    weight = torch.randn(n, k).to(dtype)
    return (lambda x, t: torch.nn.functional.linear(x.to(dtype), t[0])), weight.nbytes, [weight]


def torch_int4(n: int, k: int, group: int) -> tuple[Call, int, list[Tensor]]:
    codes = random_codes(4, n, k).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales = torch.randn(k // group, n, 2).bfloat16()
    call = lambda x, t: torch.ops.aten._weight_int4pack_mm_for_cpu(x, t[0], group, t[1])  # noqa: E731
    return call, packed.nbytes + scales.nbytes, [packed, scales]


def plain_read(nbytes_: int) -> tuple[Call, int, list[Tensor]]:
    data = torch.randint(-(2**31), 2**31 - 1, (nbytes_ // 4,), dtype=torch.int32)
    return (lambda x, t: torch.ops.hf_spqr.read_memory(t[0])), data.nbytes, [data]


def candidates(n: int, k: int, quick: bool) -> dict[str, tuple[Call, int, list[Tensor]]]:
    found = {
        "read": plain_read(n * k // 2),
        "torch bf16": torch_dense(n, k, torch.bfloat16),
        "torch int4 g128": torch_int4(n, k, 128),
        "spqr 3 g16 1%": random_spqr(n, k, 3, OUTLIERS),
        "spqr 3 g16": random_spqr(n, k, 3, 0),
        "affine 4 g128": random_affine(n, k, 4, 128),
    }
    if not quick:
        found["torch fp32"] = torch_dense(n, k, torch.float32)
        found["spqr 4 g16 1%"] = random_spqr(n, k, 4, OUTLIERS)
        found["affine 3 g128"] = random_affine(n, k, 3, 128)
        found["affine 2 g128"] = random_affine(n, k, 2, 128)
    return found


def measure(found: dict, x: Tensor, seconds: float) -> dict[str, dict[str, float]]:
    """Median seconds per call of each candidate, called in turn."""
    each = ROTATE_BYTES // len(found)
    copies = {
        name: [[t.clone() for t in tensors] for _ in range(max(2, each // size + 1))]
        for name, (_, size, tensors) in found.items()
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    started, turn = time.perf_counter(), 0
    while time.perf_counter() - started < seconds or turn < 5:
        for name, (call, _, _) in found.items():
            tensors = copies[name][turn % len(copies[name])]
            busy, wall = time.process_time(), time.perf_counter()
            call(x, tensors)
            wall = time.perf_counter() - wall
            samples[name].append((wall, (time.process_time() - busy) / wall / torch.get_num_threads()))
        turn += 1
    result = {}
    for name, taken in samples.items():
        clean = [wall for wall, share in taken if share > 0.9]
        chosen = clean if len(clean) >= 10 else [wall for wall, _ in taken]
        result[name] = {"seconds": median(chosen), "calls": len(taken), "clean": len(clean)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape and fewer candidates")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--seconds", type=float, default=6.0, help="per shape, number of threads and tokens")
    args = parser.parse_args()
    if not ops.COMPILED:
        raise SystemExit(f"the compiled kernels are missing: {ops.WHY_NOT.get('_C')}")
    print(f"{machine()['processor']}, {torch.ops.hf_spqr.cpu_isa()}")
    rows = []
    for n, k in SHAPES[:1] if args.quick else SHAPES:
        found = candidates(n, k, args.quick)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for tokens in args.tokens:
                x = torch.randn(tokens, k).bfloat16()
                timed = measure(found, x, args.seconds * (1 + tokens // 128))
                read = found["read"][1] / timed["read"]["seconds"]
                print(f"\n{n} x {k}, {tokens} tokens, {threads} threads, plain read {read / 1e9:.1f} GB/s")
                print(f"{'':18s}{'bits':>6s}{'us':>10s}{'x bf16':>8s}{'of read':>9s}{'clean':>12s}")
                for name, (_, size, _) in found.items():
                    t = timed[name]
                    row = {
                        "shape": [n, k], "threads": threads, "tokens": tokens, "name": name, "bytes": size,
                        "read_bytes_per_second": read, **t,
                    }  # fmt: skip
                    rows.append(row)
                    bits, speed = 8 * size / n / k, timed["torch bf16"]["seconds"] / t["seconds"]
                    of_read = size / t["seconds"] / read
                    print(
                        f"{name:18s}{bits:6.2f}{t['seconds'] * 1e6:10.1f}{speed:8.2f}{of_read:9.2f}"
                        f"{t['clean']:>7d}/{t['calls']}"
                    )
    name = re.sub(r"[^a-z0-9]+", "-", machine()["processor"].lower()).strip("-")
    print("\nwrote", save(f"kernels_cpu-{name}", {"isa": torch.ops.hf_spqr.cpu_isa(), "rows": rows}))


if __name__ == "__main__":
    main()
