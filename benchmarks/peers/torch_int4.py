"""torch's own 4-bit product, weight only, groups of 128."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.bench.timing import Call, Candidate

from . import rounded

GROUP = 128


def candidates(weight: Tensor, threads: int) -> list[Candidate]:
    codes, scale, zero = rounded(weight, 4, GROUP)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    # its weight is (code - 8) * scale + zero
    scales = torch.stack([scale, (8 - zero) * scale], -1).transpose(0, 1).bfloat16().contiguous()

    def copy() -> Call:
        own, own_scales = packed.clone(), scales.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, own, GROUP, own_scales)

    return [Candidate("torch int4 g128", packed.nbytes + scales.nbytes, copy)]
