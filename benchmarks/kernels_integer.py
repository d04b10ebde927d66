"""Times integer linear layers on the CPU beside torch's bf16, fp32 and oneDNN's int8 products.

    python benchmarks/kernels_integer.py [--threads 1 2] [--tokens 1 16 128 512] [--seconds 6] [--isa avx2]

Candidates are called in turn, each time on the next copy of its weights, as in kernels_cpu.py. "WxAy" is
w_int8_linear on activations that are quantized already, as oneDNN's are: its `qlinear` with a prepacked weight, one
scale per output channel and one for all activations, and `torch._int_mm`, which gives the bare integers. "+ quantize"
adds quantize_activation. Results are bfloat16. Writes benchmarks/results/kernels_integer-<processor>.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
from machine import file_name, machine, save
from torch import Tensor

from hf_spqr import ops
from hf_spqr.bench import weights
from hf_spqr.bench.timing import Call, Candidate, dense, measure

SHAPES = ((4096, 4096), (11008, 4096))
SETTINGS = ((8, 8), (6, 6), (4, 8), (4, 4))


def integers(n: int, bits: int, act_bits: int, packed: Tensor, x: Tensor, quantize: bool) -> Candidate:
    codes = ops.quantize_activation(x, None, act_bits, False)

    def copy() -> Call:
        own = packed.clone()

        def call(x: Tensor) -> Tensor:
            now = ops.quantize_activation(x, None, act_bits, False) if quantize else codes
            return ops.w_int8_linear(*now, own, None, n, bits, -1, False, False, x.dtype)

        return call

    return Candidate(f"W{bits}A{act_bits}" + " + quantize" * quantize, packed.nbytes, copy)


def onednn(n: int, k: int, x: Tensor) -> Candidate:
    packed = torch.ops.onednn.qlinear_prepack(torch.randint(-128, 128, (n, k), dtype=torch.int8), list(x.shape))
    scales, zeros = torch.rand(n), torch.zeros(n, dtype=torch.int32)
    codes = torch.randint(0, 256, tuple(x.shape), dtype=torch.uint8)

    def copy() -> Call:
        own = packed.clone()
        return lambda x: torch.ops.onednn.qlinear_pointwise(
            codes, 0.01, 128, own, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    return Candidate("oneDNN int8", n * k, copy)


def int_mm(n: int, k: int, x: Tensor) -> Candidate:
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    codes = torch.randint(-128, 128, tuple(x.shape), dtype=torch.int8)

    def copy() -> Call:
        own = weight.clone()
        return lambda x: torch._int_mm(codes, own.T)

    return Candidate("torch._int_mm", weight.nbytes, copy)


def candidates(torch_layers: list[Candidate], packed: dict[int, Tensor], n: int, k: int, x: Tensor) -> list[Candidate]:
    found = [*torch_layers, onednn(n, k, x), int_mm(n, k, x)]
    for bits, act_bits in SETTINGS:
        found += [integers(n, bits, act_bits, packed[bits], x, quantize) for quantize in (False, True)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--seconds", type=float, default=6.0, help="per shape, number of threads and tokens")
    parser.add_argument("--isa", help="lower the instruction set of our ops: scalar, avx2, avx512")
    args = parser.parse_args()
    if not ops.COMPILED:
        raise SystemExit(f"the compiled kernels are missing: {ops.WHY_NOT.get('_C')}")
    if args.isa:
        torch.ops.hf_spqr.set_cpu_isa(args.isa)
    print(f"{machine()['processor']}, {torch.ops.hf_spqr.cpu_isa()}")
    rows = []
    for n, k in SHAPES[: args.shapes]:
        torch_layers = [dense(n, k, dtype) for dtype in (torch.bfloat16, torch.float32)]
        packed = {bits: weights.affine_linear(n, k, bits=bits, group_size=-1).packed for bits, _ in SETTINGS}
        for tokens in args.tokens:
            x = torch.randn(tokens, k).bfloat16()
            found = candidates(torch_layers, packed, n, k, x)
            for threads in args.threads:
                torch.set_num_threads(threads)
                timed = measure(found, x, args.seconds)
                print(f"\n{n} x {k}, {tokens} tokens, {threads} threads")
                print(f"{'':18s}{'us':>10s}{'GOP/s':>9s}{'x bf16':>8s}{'x oneDNN':>10s}{'clean':>12s}")
                for name, t in timed.items():
                    rows.append({"shape": [n, k], "threads": threads, "tokens": tokens, "name": name, **asdict(t)})
                    speed = 2 * n * k * tokens / t.seconds / 1e9
                    beside = [timed[peer].seconds / t.seconds for peer in ("torch bf16", "oneDNN int8")]
                    print(
                        f"{name:18s}{t.seconds * 1e6:10.1f}{speed:9.0f}{beside[0]:8.2f}{beside[1]:10.2f}"
                        f"{t.clean:>7d}/{t.calls}"
                    )
    name = file_name("kernels_integer", machine()["processor"], args.isa or "")
    print("\nwrote", save(name, {"isa": torch.ops.hf_spqr.cpu_isa(), "rows": rows}))


if __name__ == "__main__":
    main()
