"""auto-round's CPU kernels (auto-round-lib), int8 activations, groups of 128, symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.bench.timing import Call, Candidate

GROUP = 128
BITS = (4, 3, 2)


def candidates(weight: Tensor, threads: int) -> list[Candidate]:
    import auto_round_kernel as kernels

    rows, columns = weight.shape
    none = torch.empty(0)
    grouped = weight.reshape(rows, columns // GROUP, GROUP)
    found = []
    for bits in BITS:
        half = 2 ** (bits - 1)
        scale = grouped.abs().amax(-1) / (half - 0.5)
        codes = (grouped / scale[..., None]).round().clamp(-half, half - 1).reshape(rows, columns)
        kind = (GROUP, "int8", f"int{bits}", "fp32", False)
        packed = kernels.repack_quantized_weight(
            codes.T.to(torch.int8).contiguous(), scale.T.contiguous(), none, *kind
        )

        def copy(packed: Tensor = packed, kind: tuple = kind) -> Call:
            own = packed.clone()
            return lambda x: kernels.woqgemm(x, own, none, rows, columns, *kind)

        found.append(Candidate(f"auto-round int{bits} g128", packed.nbytes, copy, lambda x: x.float(), "auto-round"))
    return found
