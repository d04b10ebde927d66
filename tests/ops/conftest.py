"""Op tests run on each instruction set of this machine, on the PyTorch reference where nothing is compiled."""

import platform
from collections.abc import Iterator

import pytest
import torch

from hf_spqr import ops

ARM_ISAS = ("neon", "neon_dotprod")
X86_ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
ISAS = ARM_ISAS if platform.machine().lower() in ("aarch64", "arm64") else X86_ISAS


def available() -> tuple[str, ...]:
    if not ops.COMPILED:
        return ("reference",)
    return ISAS[: ISAS.index(torch.ops.hf_spqr.cpu_isa()) + 1]


@pytest.fixture(params=available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "reference":
        yield "reference"
        return
    before = torch.ops.hf_spqr.set_cpu_isa(request.param)
    yield request.param
    torch.ops.hf_spqr.set_cpu_isa(before)
