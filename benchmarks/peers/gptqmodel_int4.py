"""GPTQModel's W4A16 kernel for AVX-512 with BF16, groups of 128; GPTQModel compiles it when it is first used."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.bench.timing import Call, Candidate

from . import rounded

GROUP = 128


def candidates(weight: Tensor, threads: int) -> list[Candidate]:
    from gptqmodel.nn_modules.qlinear.torch_cpu_avx512 import TorchCpuAvx512Linear, pack_hf_int4

    usable, why_not = TorchCpuAvx512Linear.validate_once()
    if not usable:
        raise ImportError(str(why_not))
    multiply = TorchCpuAvx512Linear.gemm_int4_qzero_group_scaled_cpu_kernel
    codes, scale, zero = rounded(weight, 4, GROUP)
    tensors = (pack_hf_int4(codes), zero.T.to(torch.uint8).contiguous(), scale.T.contiguous())

    def copy() -> Call:
        q, zeros, scales = [tensor.clone() for tensor in tensors]
        return lambda x: multiply(x, q, zeros, scales, GROUP, None)

    return [Candidate("GPTQModel int4 g128", sum(tensor.nbytes for tensor in tensors), copy)]
