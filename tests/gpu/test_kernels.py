"""The ops on a GPU against the PyTorch reference on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_spqr.bench.check import check_kernels
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout
from tests.cuda.test_kernels_emulated import ERROR, natural_affine, natural_spqr
from tests.gpu.on_device import OnDevice

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOKENS = (1, 2, 8, 9, 16, 17, 32, 64, 65, 128, 300)

SPQR = [  # rows, columns, bits, group, stat bits, second group, perm, outliers
    (4096, 4096, 3, 16, 3, 16, False, 0.01),
    (11008, 4096, 3, 16, 3, 32, True, 0.01),
    (37, 519, 3, 16, 3, 16, True, 0.2),
    (1000, 3000, 2, 16, 3, 16, False, 0.0),
    (1000, 3000, 4, 16, 3, 16, False, 0.05),
    (100, 700, 3, 8, 4, 16, False, 0.01),
    (100, 5000, 4, 128, 8, 32, False, 0.01),
    (100, 700, 2, -1, 5, 16, False, 0.01),
    (100, 700, 6, 16, 3, 16, False, 0.01),
    (50, 65536, 3, 16, 3, 16, False, 0.001),
    (10, 70000, 3, 16, 3, 16, False, 0.001),
    (12800, 5120, 3, 16, 3, 16, False, 0.01),  # enough rows to share x, too many columns for x in shared memory
]
AFFINE = [  # rows, columns, bits, group, symmetric, scale dtype, perm
    (4096, 4096, 4, 128, False, F16, False),
    (1000, 11008, 3, 128, False, BF16, True),
    (333, 4500, 2, 64, True, F16, False),
    (333, 4500, 3, 64, False, BF16, True),
    (1000, 3000, 4, 32, False, F16, False),
    (333, 900, 4, 16, False, BF16, False),
    (333, 900, 8, 128, False, F16, False),
    (333, 900, 4, -1, True, BF16, False),
    (333, 900, 6, 32, False, F16, False),
]


@pytest.fixture(scope="module", params=range(len(SPQR) + len(AFFINE)))
def matrix(request: pytest.FixtureRequest) -> OnDevice:
    a = (SPQR + AFFINE)[request.param]
    if request.param < len(SPQR):
        return OnDevice(natural_spqr(SpQRLayout(*a[:6]), a[7], a[6], 1))
    return OnDevice(natural_affine(AffineLayout(*a[:6]), a[6], 1))


def some_x(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype).cuda()


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_linear(matrix: OnDevice, dtype: torch.dtype) -> None:
    dense = matrix.weight.dequantize().double().cuda()
    bias = torch.randn(matrix.rows).to(dtype).cuda()
    for tokens in TOKENS:
        x = some_x(tokens, matrix.columns, dtype)
        y = matrix.linear(x, bias)
        want = x.double() @ dense.T + bias.double()
        error = ((y.double() - want).norm() / want.norm()).item()
        assert y.dtype == dtype and error < ERROR[dtype], f"{tokens} tokens: relative error {error:.2e}"
        assert torch.equal(y, matrix.linear(x, bias)), "two runs differ"


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_dequantize_is_exact(matrix: OnDevice, dtype: torch.dtype) -> None:
    assert torch.equal(matrix.dequantize(dtype).cpu(), matrix.weight.dequantize(dtype))


def test_no_tokens(matrix: OnDevice) -> None:
    assert matrix.linear(torch.empty(2, 0, matrix.columns, device="cuda")).shape == (2, 0, matrix.rows)


def test_shapes_and_strides(matrix: OnDevice) -> None:
    x = some_x(12, matrix.columns, F16)
    want = matrix.linear(x)
    assert torch.equal(matrix.linear(x.view(3, 4, -1)).view(12, -1), want)
    assert torch.equal(matrix.linear(x.T.contiguous().T), want)
    shifted = torch.empty(x.numel() + 1, dtype=F16, device="cuda")[1:].view_as(x).copy_(x)  # not aligned
    if matrix.weight.layout.bits < 5 and matrix.columns <= 65536:
        assert torch.equal(matrix.linear(shifted), want)
    else:  # through torch's matrix product, which is free to round otherwise where x is not aligned
        assert (matrix.linear(shifted) - want).norm() <= 1e-3 * want.norm()


def test_other_stream(matrix: OnDevice) -> None:
    x = some_x(4, matrix.columns, F16)
    want = matrix.linear(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = matrix.linear(x)
    stream.synchronize()
    assert torch.equal(y, want)


@pytest.mark.parametrize("tokens", [1, 16, 64, 100, 200])
def test_graph_replay(matrix: OnDevice, tokens: int) -> None:
    """Nothing waits, allocates outside of the graph's pool, or reads results on the host."""
    x = some_x(tokens, matrix.columns, F16)
    matrix.linear(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matrix.linear(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, matrix.linear(x))


def test_tensors_on_different_devices(matrix: OnDevice) -> None:
    with pytest.raises(RuntimeError, match="packed is not on a GPU"):
        matrix.on("cpu").linear(some_x(1, matrix.columns, F16))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_second_gpu(matrix: OnDevice) -> None:
    x = some_x(3, matrix.columns, F16)
    there = matrix.on("cuda:1")
    assert torch.equal(there.linear(x.to("cuda:1")).cpu(), matrix.linear(x).cpu())
    with pytest.raises(RuntimeError, match="cuda:1"):
        there.linear(x)


def test_opcheck() -> None:
    matrix = OnDevice(natural_spqr(SpQRLayout(48, 300), 0.01, True, 2))
    matrix.opcheck(some_x(2, 300, F16))
    matrix = OnDevice(natural_affine(AffineLayout(48, 300, 4, 128), True, 2))
    matrix.opcheck(some_x(2, 300, F16))


def test_compile_with_graphs() -> None:
    matrix = OnDevice(natural_spqr(SpQRLayout(512, 512), 0.01, False, 2))

    def twice(x: Tensor) -> Tensor:
        return matrix.linear(torch.relu(matrix.linear(x)))

    compiled = torch.compile(twice, fullgraph=True, mode="reduce-overhead")
    x = some_x(1, 512, F16)
    for _ in range(4):
        assert torch.allclose(compiled(x), twice(x), rtol=1e-2, atol=1e-2)


def test_the_doctor_finds_nothing() -> None:
    found = check_kernels("cuda:0")
    assert found.products > 100 and found.wrong == []
