"""Op tests run on each instruction set of this machine, on the PyTorch reference where nothing is compiled."""

from collections.abc import Iterator

import pytest
import torch

from hf_spqr import ops

ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")


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
