"""Other libraries' 4-bit and similar linear layers, one file each, for benchmarks/kernels_cpu.py.

A file has ``candidates(weight, threads)``: candidates for a float32 matrix [out_features, in_features] whose rows
repeat after SAMPLE_ROWS. It raises ImportError where the library is not installed or lacks what is needed here. A
peer runs with all that it prepares for itself (packed weights, its own choice of kernel, its own threads), and is
left out if its result is not the product. OMP_NUM_THREADS must be ``threads``: some ask only that.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_spqr.bench.timing import Candidate

NAMES = (
    "torch_int4", "torchao_int4", "bitsandbytes_nf4", "ggml", "gptqmodel_int4", "auto_round",
    "onnxruntime_int4",
)  # fmt: skip
SAMPLE_ROWS = 256
WRONG = 0.7
"""Relative error of a product above which it is none: unrelated numbers have more than 1, rounding to 2 bits 0.6."""


def random_weight(rows: int, columns: int) -> Tensor:
    """Normal weights of a layer whose output is as large as its input."""
    sample = torch.randn(SAMPLE_ROWS, columns) * columns**-0.5
    return sample.repeat(-(-rows // SAMPLE_ROWS), 1)[:rows].contiguous()


def rounded(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [rows, columns], scales and zero points float32 [rows, groups] of rounding to nearest."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, columns // group, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8).reshape(rows, columns), scale, zero


def installed(weight: Tensor, threads: int, names: Sequence[str]) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates of all peers that are there, and why the others are not."""
    found: list[Candidate] = []
    left_out = {}
    for name in names:
        try:
            candidates = importlib.import_module(f"peers.{name}").candidates(weight, threads)
        except (ImportError, OSError) as error:
            left_out[name] = str(error).splitlines()[0]
            continue
        for candidate in candidates:
            error = relative_error(candidate, weight)
            if error < WRONG:
                found.append(candidate)
            else:
                left_out[candidate.name] = f"its result is wrong: relative error {error:.2f}"
    return found, left_out


def relative_error(candidate: Candidate, weight: Tensor) -> float:
    """Of a product with 3 tokens, against the weights before they were quantized."""
    x = torch.randn(3, weight.shape[1]).bfloat16()
    y = torch.as_tensor(candidate.copy()(candidate.prepare(x))).float()
    exact = x.float() @ weight.T
    return float((y - exact).norm() / exact.norm())
