"""What fusing layers that share an input could gain at most on the CPU: one call of a taller matrix against several.

    python benchmarks/fused_cpu.py [--threads 1 2] [--seconds 8]

q, k and v of a 4096-wide model with as many key heads as query heads (three of 4096 × 4096), with a quarter of them
(4096 and twice 1024), and gate and up (two of 11008 × 4096), at batch 1, called in turn on weights from memory. Writes
benchmarks/results/fused_cpu-<processor>.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from machine import file_name, machine, save

from hf_spqr import ops
from hf_spqr.bench import weights
from hf_spqr.bench.timing import Call, Candidate, measure

COLUMNS = 4096
SETS = {"q, k, v": (4096, 4096, 4096), "q, k, v, grouped": (4096, 1024, 1024), "gate, up": (11008, 11008)}
KINDS: dict[str, Callable[[int, int], Any]] = {
    "spqr 3 g16 1%": weights.spqr_linear,
    "affine 4 g128": weights.affine_linear,
}


def calls(name: str, make: Callable[[int, int], Any], rows: tuple[int, ...]) -> Candidate:
    """One call of each matrix."""

    def copy() -> Call:
        layers = [make(n, COLUMNS) for n in rows]
        return lambda x: [layer(x) for layer in layers]

    return Candidate(name, sum(make(n, COLUMNS).nbytes() for n in rows), copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=8.0, help="per set of layers and number of threads")
    args = parser.parse_args()
    if not ops.COMPILED:
        raise SystemExit(f"the compiled kernels are missing: {ops.WHY_NOT.get('_C')}")
    rows = []
    x = torch.randn(1, COLUMNS).bfloat16()
    for name, shapes in SETS.items():
        for threads in args.threads:
            torch.set_num_threads(threads)
            found = []
            for kind, make in KINDS.items():
                found += [calls(f"{kind} {len(shapes)} calls", make, shapes)]
                found += [calls(f"{kind} one call", make, (sum(shapes),))]
            timed = measure(found, x, args.seconds)
            for kind in KINDS:
                several, one = (timed[f"{kind} {how}"].seconds for how in (f"{len(shapes)} calls", "one call"))
                rows.append({"layers": name, "rows": shapes, "threads": threads, "kind": kind,
                             "seconds_of_several": several, "seconds_of_one": one})  # fmt: skip
                print(f"{name:18s}{kind:15s}{threads} threads: {several * 1e6:7.0f} us in {len(shapes)} calls, "
                      f"{one * 1e6:7.0f} us in one: {several / one - 1:+.1%}", flush=True)  # fmt: skip
    print(save(file_name("fused_cpu", machine()["processor"]), {"isa": torch.ops.hf_spqr.cpu_isa(), "rows": rows}))


if __name__ == "__main__":
    main()
