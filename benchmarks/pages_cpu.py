"""Whether weights should stay in the mapped file: its 4 KB pages and 8-byte alignment against a copy in 2 MB pages.

    python benchmarks/pages_cpu.py [--layers 64] [--threads 1 2] [--seconds 10]

Layers of 4096 × 4096 lie one after another in a file, as safetensors writes them: each tensor at a multiple of 8 bytes
("8 bytes": never at one of 64) or of 64. They are used where the file is mapped, or copied into memory for which 2 MB
pages were asked (madvise). All four are called in turn at batch 1. Beside it, for each: seconds until the weights can
be used, seconds of the first call of all layers, and resident memory. The file is in the page cache, as after a first
load. Writes benchmarks/results/pages_cpu-<processor>.json.
"""

from __future__ import annotations

import argparse
import mmap
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import file_name, machine, memory, merge, save
from torch import Tensor

from hf_spqr import ops
from hf_spqr.bench import weights
from hf_spqr.bench.timing import Candidate, measure
from hf_spqr.nn import AffineLinear, PackedLinear, SpQRLinear

SHAPE = (4096, 4096)
KINDS = {"spqr 3 g16 1%": weights.spqr_linear, "affine 4 g128": weights.affine_linear}
SETTING = ("kind", "threads")
WAYS = [(place, alignment) for place in ("mapped", "2 MB pages") for alignment in (8, 64)]
Places = list[dict[str, tuple[int, torch.Size]]]


def write(path: Path, layer: PackedLinear, layers: int, alignment: int) -> Places:
    """The file, and where in it each tensor of each layer begins."""
    places: Places = []
    with path.open("wb") as file:
        for _ in range(layers):
            found = {}
            for name, tensor in layer.packed_tensors().items():
                start = -(-file.tell() // 64) * 64 + (8 if alignment == 8 else 0)
                file.seek(start)
                file.write(tensor.numpy().tobytes())
                found[name] = (start, tensor.shape)
            places.append(found)
    return places


def take(path: Path, place: str) -> mmap.mmap:
    """The file's bytes: mapped, or copied."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if place == "mapped":
        return mapped
    copy = mmap.mmap(-1, len(mapped), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy.madvise(mmap.MADV_HUGEPAGE)
    copy[:] = mapped[:]
    mapped.close()
    return copy


def layers_in(data: mmap.mmap, places: Places, like: PackedLinear) -> list[PackedLinear]:
    kind = SpQRLinear if isinstance(like, SpQRLinear) else AffineLinear

    def tensor(start: int, shape: torch.Size) -> Tensor:
        return torch.frombuffer(data, dtype=torch.int32, count=shape.numel(), offset=start).reshape(shape)

    return [
        kind(like.layout, {name: tensor(*where) for name, where in found.items()}, dtype=torch.bfloat16)
        for found in places
    ]


@torch.no_grad()
def run(kind: str, folder: Path, count: int, threads: list[int], seconds: float) -> list[dict[str, Any]]:
    layer = KINDS[kind](*SHAPE)
    x = torch.randn(1, SHAPE[1]).bfloat16()
    calls: dict[str, list[Any]] = {}
    about = {}
    for place, alignment in WAYS:
        path = folder / f"{alignment}"
        places = write(path, layer, count, alignment)
        before, start = memory(), time.perf_counter()
        found = layers_in(take(path, place), places, layer)
        loaded = time.perf_counter()
        for one in found:
            one(x)
        first, after = time.perf_counter(), memory()
        calls[f"{place}, {alignment} bytes"] = found
        about[f"{place}, {alignment} bytes"] = {
            "load_seconds": loaded - start, "first_seconds": first - loaded,
            "resident_bytes": after["resident"] - before["resident"],
            "anonymous_bytes": after["anonymous"] - before["anonymous"],
            "huge_bytes": after["huge"] - before["huge"], "bytes": count * layer.nbytes(),
        }  # fmt: skip
    rows = []
    for number in threads:
        torch.set_num_threads(number)
        timed = measure([Candidate(name, layer.nbytes(), list) for name in calls], x, seconds, calls)
        for name, t in timed.items():
            rows.append({"kind": kind, "threads": number, "way": name, "seconds": t.seconds, **about[name]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64, help="64 are 530 MB, four times that are needed")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="per kind and number of threads")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    if not ops.COMPILED:
        raise SystemExit(f"the compiled kernels are missing: {ops.WHY_NOT.get('_C')}")
    rows = []
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            rows += run(kind, Path(folder), args.layers, args.threads, args.seconds)
    for row in rows:
        base = next(r for r in rows if [r[k] for k in SETTING] == [row[k] for k in SETTING])
        print(
            f"{row['kind']:15s}{row['threads']} threads {row['way']:22s}{row['seconds'] * 1e6:7.1f} us "
            f"{base['seconds'] / row['seconds'] - 1:+6.1%}  ready in {row['load_seconds']:.3f} s, first calls "
            f"{row['first_seconds']:.3f} s, resident {row['resident_bytes'] / 1e6:.0f} MB, of these "
            f"{row['anonymous_bytes'] / 1e6:.0f} MB its own and {row['huge_bytes'] / 1e6:.0f} MB in 2 MB pages"
        )
    name = file_name("pages_cpu", machine()["processor"])
    print(save(name, {"isa": torch.ops.hf_spqr.cpu_isa(), "rows": merge(name, rows, SETTING)}))


if __name__ == "__main__":
    main()
