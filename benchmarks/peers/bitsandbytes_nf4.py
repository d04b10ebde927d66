"""bitsandbytes' NF4 layer, blocks of 64."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.bench.timing import Call, Candidate


def candidates(weight: Tensor, threads: int) -> list[Candidate]:
    import bitsandbytes as bnb

    def copy() -> Call:
        layer = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, compress_statistics=False,
            quant_type="nf4",
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            weight.bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=False
        )
        layer = layer.to("cpu").eval()
        layer(torch.zeros(1, weight.shape[1], dtype=torch.bfloat16))  # packs for this processor
        return layer

    state = copy().weight
    nbytes = state.nbytes + state.quant_state.absmax.nbytes
    return [Candidate("bitsandbytes nf4 g64", nbytes, copy)]
