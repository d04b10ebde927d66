"""torchao's int8-dynamic activations times 4-bit weights in groups of 128.

The kernels are in torchao's own CPU builds only (from source with USE_CPU_KERNELS=1), not in the wheel on PyPI.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_spqr.bench.timing import Call, Candidate

from . import rounded

GROUP = 128


def candidates(weight: Tensor, threads: int) -> list[Candidate]:
    import torchao  # noqa: F401  (its ops)

    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchao::da8w4_linear_cpu", "CPU"):
        raise ImportError("this torchao was built without its CPU kernels (USE_CPU_KERNELS=1, from source)")
    codes, scale, zero = rounded(weight, 4, GROUP)
    packed = torch.ops.torchao.da8w4_linear_prepack_cpu(codes, scale, zero.to(torch.int8))

    def copy() -> Call:
        q, scales, zeros, compensation = [tensor.clone() for tensor in packed]

        def call(x: Tensor) -> Tensor:
            low, high = torch.aminmax(x, dim=-1, keepdim=True)
            low, high = low.float().clamp(max=0), high.float().clamp(min=0)
            step = ((high - low) / 255).clamp(min=1e-7)
            offset = (-low / step).round()
            code = (x / step + offset).round_().clamp_(0, 255).to(torch.uint8)
            return torch.ops.torchao.da8w4_linear_cpu(
                code, step, offset.int(), q, scales, zeros, compensation, None, x.dtype
            )

        return call

    return [Candidate("torchao int8 x int4 g128", sum(tensor.nbytes for tensor in packed), copy)]
