"""Times packed layers on the CPU beside torch's bf16 and fp32 layers, every other library's 4-bit layer that is
installed, and the memory's bandwidth.

    python benchmarks/kernels_cpu.py [--quick] [--peers ...] [--shapes 4096x4096] [--threads 1 2] [--tokens 1 16 512]

All candidates of a setting are called in turn, each time on the next copies of its weights; together the copies exceed
1 GB, so that none comes from a cache, as in a decoding model. The plain read of memory is one of the candidates. Our
layers are modules, called as a model calls them. Each candidate is called twice in its turn, and the second call
counts. Times are medians over calls in which the process had the processor (at least nine tenths of its threads'
time), where a quarter of the calls are such, else over all calls; `clean` counts them. Libraries with threads of their
own take turns for themselves, after a pause in which the others' threads fall asleep. "of read" is a candidate's
packed bytes per second over what the plain read reached; the ideal is 1.

Writes benchmarks/results/kernels_cpu-<processor>.json; settings that are not measured this time stay in it. Then
`python benchmarks/kernels_cpu_table.py` prints the tables of docs/cpu.md and draws the plot.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

import peers
import torch
from machine import file_name, machine, merge, save

from hf_spqr import ops
from hf_spqr.bench import weights
from hf_spqr.bench.timing import Candidate, dense, measure, module, plain_read, rotating
from hf_spqr.nn import PackedLinear

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))
SETTING = ("shape", "threads", "tokens")


def ours(n: int, k: int, quick: bool) -> list[Candidate]:
    layers: dict[str, PackedLinear] = {
        "spqr 3 g16 1%": weights.spqr_linear(n, k),
        "spqr 3 g16": weights.spqr_linear(n, k, outliers=0),
        "affine 4 g128": weights.affine_linear(n, k),
    }
    if not quick:
        layers["spqr 4 g16 1%"] = weights.spqr_linear(n, k, bits=4)
        layers["affine 3 g128"] = weights.affine_linear(n, k, bits=3)
        layers["affine 2 g128"] = weights.affine_linear(n, k, bits=2)
        for name in ("spqr 3 g16 1%", "affine 4 g128"):  # as llama.cpp and onnxruntime round activations
            rounded = copy.deepcopy(layers[name])
            rounded.backend = "int8_activations"
            layers[f"{name} int8"] = rounded
    return [module(name, layer, layer.nbytes()) for name, layer in layers.items()]


def candidates(
    n: int, k: int, threads: int, quick: bool, names: Sequence[str]
) -> tuple[list[Candidate], dict[str, str]]:
    found = [plain_read(n * k // 2), dense(n, k, torch.bfloat16), *ours(n, k, quick)]
    if not quick:
        found.append(dense(n, k, torch.float32))
    others, left_out = peers.installed(peers.random_weight(n, k), threads, names)
    return found + others, left_out


def show(title: str, rows: list[dict], read: float) -> None:
    bf16 = next(row["seconds"] for row in rows if row["name"] == "torch bf16")
    print(f"\n{title}, plain read {read / 1e9:.1f} GB/s")
    print(f"{'':26s}{'bits':>6s}{'us':>10s}{'x bf16':>8s}{'of read':>9s}{'clean':>12s}")
    for row in rows:
        n, k = row["shape"]
        print(
            f"{row['name']:26s}{8 * row['bytes'] / n / k:6.2f}{row['seconds'] * 1e6:10.1f}"
            f"{bf16 / row['seconds']:8.2f}{row['bytes'] / row['seconds'] / read:9.2f}"
            f"{row['clean']:>7d}/{row['calls']}",
            flush=True,
        )


def in_processes(threads: Sequence[int]) -> None:
    """This command once for each number of threads: some libraries take it from the environment at the start only."""
    for count in threads:
        environment = os.environ | {"OMP_NUM_THREADS": str(count)}
        subprocess.run([sys.executable, *sys.argv, "--threads", str(count)], check=True, env=environment)


def shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit()):
        raise argparse.ArgumentTypeError(f"{text}: write it like 4096x4096, outputs x inputs")
    return int(n), int(k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape and fewer candidates")
    parser.add_argument("--peers", nargs="*", default=peers.NAMES, choices=peers.NAMES, help="default all, or none")
    parser.add_argument("--shapes", type=shape, nargs="+", help="outputs x inputs, like 4096x4096")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--seconds", type=float, default=6.0, help="per shape, number of threads and tokens")
    args = parser.parse_args()
    if not ops.COMPILED:
        raise SystemExit(f"the compiled kernels are missing: {ops.WHY_NOT.get('_C')}")
    if len(args.threads) > 1 or os.environ.get("OMP_NUM_THREADS") != str(args.threads[0]):
        in_processes(args.threads)
        return
    print(f"{machine()['processor']}, {torch.ops.hf_spqr.cpu_isa()}")
    threads = args.threads[0]
    torch.set_num_threads(threads)
    rows: list[dict] = []
    left_out: dict[str, str] = {}
    for n, k in args.shapes or (SHAPES[:1] if args.quick else SHAPES):
        found, left_out = candidates(n, k, threads, args.quick, args.peers)
        copies = rotating(found)
        for tokens in args.tokens:
            x = torch.randn(tokens, k).bfloat16()
            timed = measure(found, x, args.seconds * (1 + tokens // 128), copies)
            read = found[0].nbytes / timed["read"].seconds
            here = [
                {
                    "shape": [n, k], "threads": threads, "tokens": tokens, "name": c.name, "bytes": c.nbytes,
                    "read_bytes_per_second": read, **asdict(timed[c.name]),
                }
                for c in found
            ]  # fmt: skip
            show(f"{n} x {k}, {tokens} tokens, {threads} threads", here, read)
            rows += here
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    name = file_name("kernels_cpu", machine()["processor"])
    result = {"isa": torch.ops.hf_spqr.cpu_isa(), "left_out": left_out, "rows": merge(name, rows, SETTING)}
    print("wrote", save(name, result))


if __name__ == "__main__":
    main()
