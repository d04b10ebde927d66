"""Do the kernels of this machine compute what the PyTorch reference computes? For ``hf-spqr doctor``.

Kernels are chosen by processor, layout, dtype and number of tokens; many processors and GPUs never ran the tests.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_spqr.bench.run import Kind
from hf_spqr.nn import AffineLinear

__all__ = ["Findings", "check_kernels"]

ROWS, COLUMNS = 250, 1096  # no multiples of what kernels take at a time
TOKENS = (1, 3, 12, 40, 100, 300)
"""One for each way in which a kernel of some processor or GPU goes about its work."""
KINDS = (
    Kind("spqr", 3, 16, 0.01),
    Kind("spqr", 2, 16, 0.01),
    Kind("spqr", 4, 16, 0.01),
    Kind("spqr", 3, 32),
    Kind("affine", 4, 128),
    Kind("affine", 3, 128),
    Kind("affine", 2, 64),
    Kind("affine", 4, -1),
    Kind("affine", 8, -1),
)
ACT_BITS = (8, 4)
LIMITS = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Largest error of a token's outputs, relative to them as vectors. Weights may be rounded to 16 bits, sums in another
order; a missing outlier or a wrong statistic gives ten times as much."""


@dataclass(frozen=True)
class Findings:
    """products: how many were compared. wrong: what differs, in words; empty if nothing does."""

    products: int
    wrong: list[str]


@torch.no_grad()
def check_kernels(device: str) -> Findings:
    """Compare the ops on ``device`` with the reference on the CPU, on small random layers; takes a second or two."""
    products, wrong = 0, []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for kind in KINDS:
            layer = kind.layer(ROWS, COLUMNS, "cpu")
            layer.backend = "reference"
            dense = layer.dequantize_weight(torch.float32).double()
            there = copy.deepcopy(layer).to(device)
            there.backend = "auto"
            error = _error(there.dequantize_weight(torch.float32).cpu(), dense)
            if not error < LIMITS[torch.float32]:
                wrong.append(f"{kind.name}, as a dense matrix: off by {error:.1%}")
            for dtype, limit in LIMITS.items():
                x = torch.randn(max(TOKENS), COLUMNS).to(dtype)
                expected = x.double() @ dense.T
                for tokens in TOKENS:
                    error = _error(there(x[:tokens].to(device)).cpu(), expected[:tokens])
                    products += 1
                    if not error < limit:  # nor NaN
                        wrong.append(f"{kind.name}, {tokens} tokens, {_name(dtype)}: off by {error:.1%}")
            if isinstance(layer, AffineLinear):
                for act_bits in ACT_BITS:
                    layer.act_bits = there.act_bits = act_bits
                    x = torch.randn(max(TOKENS), COLUMNS)
                    expected = layer(x)
                    for tokens in TOKENS:
                        y = there(x[:tokens].to(device)).cpu()
                        products += 1
                        if not torch.equal(y, expected[:tokens]):
                            wrong.append(f"{kind.name}, {tokens} tokens, integers of {act_bits} bit")
    return Findings(products, wrong)


def _error(y: Tensor, expected: Tensor) -> float:
    """The largest of all tokens."""
    return ((y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
