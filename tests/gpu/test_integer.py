"""Integer execution on a GPU: equal to the PyTorch reference on the CPU, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_spqr import ops
from hf_spqr.formats import affine
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.ops import reference
from tests.cuda.test_integer_emulated import some_tokens
from tests.weights import random_affine

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOKENS = (1, 7, 8, 9, 16, 17, 33, 64, 65, 200, 513)

LAYOUTS = [  # rows, columns, bits, group, symmetric, scale dtype
    (4096, 4096, 8, -1, True, F16),
    (1000, 11008, 4, -1, False, F16),
    (777, 2000, 6, -1, False, BF16),
    (333, 901, 8, -1, False, F16),
    (512, 1040, 3, -1, True, F16),
    (100, 512, 2, -1, False, F16),
    (130, 300, 5, -1, False, F16),
    (130, 300, 7, -1, False, F16),
    (65, 128, 1, -1, True, F16),
    (50, 40000, 8, -1, False, F16),
    (10, 70000, 8, -1, False, F16),
    (1024, 4096, 4, 128, False, F16),
    (333, 900, 8, 64, True, BF16),
    (333, 900, 4, 32, False, F16),
    (100, 700, 6, 16, False, F16),
    (100, 700, 2, 8, True, F16),
]


def layout_of(args: tuple) -> AffineLayout:
    return AffineLayout(*args)


class Problem:
    """A packed matrix and random codes of activations, on the CPU."""

    def __init__(self, args: tuple, tokens: int, dtype: torch.dtype, bias: bool = True) -> None:
        lay = layout_of(args)
        self.weight = random_affine(lay, seed=1)
        gen = torch.Generator().manual_seed(tokens)
        self.code = torch.randint(-128, 128, (tokens, lay.in_features), generator=gen, dtype=torch.int8)
        self.zero = torch.randint(-128, 128, (tokens, 1), generator=gen, dtype=torch.int32)
        self.scale = torch.rand(tokens, 1, generator=gen) * 1e-3
        numbers = (lay.bits, lay.group_size, lay.symmetric, lay.scale_dtype == BF16)
        given = torch.randn(lay.out_features, generator=gen).to(dtype) if bias else None
        self.rest = (affine.pack(self.weight)["packed"], given, lay.out_features, *numbers, dtype)

    def expected(self) -> Tensor:
        return reference.w_int8_linear(self.code, self.scale, self.zero, *self.rest)

    def arguments(self) -> tuple[Any, ...]:
        all_of_them = (self.code, self.scale, self.zero, *self.rest)
        return tuple(a.cuda() if isinstance(a, Tensor) else a for a in all_of_them)


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("perm", [False, True])
def test_quantize(dtype: torch.dtype, perm: bool) -> None:
    for tokens, columns in ((1, 4096), (5, 77), (300, 11008), (3, 264), (2, 1)):
        x = some_tokens(tokens, columns, dtype, columns)
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(1)).int() if perm else None
        for bits in range(2, 9):
            for symmetric in (False, True):
                got = ops.quantize_activation(x.cuda(), order.cuda() if perm else None, bits, symmetric)
                for mine, want in zip(got, reference.quantize_activation(x, order, bits, symmetric), strict=True):
                    assert torch.equal(mine.cpu(), want)


def test_quantize_tokens_that_are_not_finite() -> None:
    x = torch.randn(5, 300)
    for token, bad in enumerate((float("nan"), float("inf"), -float("inf"))):
        x[token, 99 * token] = bad
    for symmetric in (False, True):
        code, scale, zero = (t.cpu() for t in ops.quantize_activation(x.cuda(), None, 8, symmetric))
        assert scale[:3].isnan().all() and not code[:3].any() and not zero[:3].any()
        assert scale[3:].isfinite().all()


@pytest.mark.parametrize("args", LAYOUTS)
def test_linear(args: tuple) -> None:
    for i, tokens in enumerate(TOKENS if args[1] < 30000 else TOKENS[:5]):
        problem = Problem(args, tokens, (F32, F16, BF16)[i % 3], bias=i % 2 == 0)
        arguments = problem.arguments()
        y = ops.w_int8_linear(*arguments)
        assert torch.equal(y.cpu(), problem.expected()), f"{tokens} tokens"
        assert torch.equal(y, ops.w_int8_linear(*arguments)), "two runs differ"


@pytest.mark.parametrize("tokens", [64, 65, 300, 1000])
def test_codes_of_four_bits(tokens: int) -> None:
    """Many tokens take tensor cores of int4 where the GPU has them (compute capability 8)."""
    for columns in (4096, 333):
        problem = Problem((1000, columns, 4, -1, False, F16), tokens, F16)
        problem.code = problem.code >> 4
        assert torch.equal(ops.w_int8_linear(*problem.arguments(), 4).cpu(), problem.expected())


def test_many_columns_and_tokens() -> None:
    """Beyond what int32 holds also in the kernel for many tokens."""
    problem = Problem((16, 40000, 8, -1, False, F16), 100, F32)
    problem.weight.codes.fill_(255), problem.weight.zeros.zero_()
    problem.rest = (affine.pack(problem.weight)["packed"], *problem.rest[1:])
    problem.code[:] = 127
    problem.zero[:] = -128
    assert torch.equal(ops.w_int8_linear(*problem.arguments()).cpu(), problem.expected())


@pytest.mark.parametrize("args", [LAYOUTS[1], LAYOUTS[3], LAYOUTS[11]])
def test_shapes_and_strides(args: tuple) -> None:
    code, scale, zero, *rest = Problem(args, 12, F16).arguments()
    want = ops.w_int8_linear(code, scale, zero, *rest)
    several = [t.view(3, 4, -1) for t in (code, scale, zero)]
    assert torch.equal(ops.w_int8_linear(*several, *rest).view(12, -1), want)
    assert torch.equal(ops.w_int8_linear(code.T.contiguous().T, scale, zero, *rest), want)
    shifted = torch.empty(code.numel() + 1, dtype=torch.int8, device="cuda")[1:].view_as(code).copy_(code)
    assert torch.equal(ops.w_int8_linear(shifted, scale, zero, *rest), want)
    assert ops.w_int8_linear(code[:0], scale[:0], zero[:0], *rest).shape == (0, args[0])


@pytest.mark.parametrize("tokens", [1, 16, 64, 200])
@pytest.mark.parametrize("args", [LAYOUTS[1], LAYOUTS[3], LAYOUTS[11]])
def test_graph_replay(args: tuple, tokens: int) -> None:
    """Nothing waits, allocates outside of the graph's pool, or reads results on the host."""
    rest = Problem(args, tokens, F16).arguments()[3:]
    x = torch.randn(tokens, args[1], device="cuda", dtype=F16)

    def both() -> Tensor:
        return ops.w_int8_linear(*ops.quantize_activation(x, None, 8, False), *rest)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = both()
    for seed in range(2):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).half())
        graph.replay()
        assert torch.equal(y, both())


def test_mistakes_are_named() -> None:
    code, scale, zero, *rest = Problem(LAYOUTS[2], 3, F16).arguments()
    with pytest.raises(RuntimeError, match="scale is not on a GPU"):
        ops.w_int8_linear(code, scale.cpu(), zero, *rest)
    with pytest.raises(RuntimeError, match="zero must have the shape of code"):
        ops.w_int8_linear(code, scale, zero[:2], *rest)
    with pytest.raises(RuntimeError, match="bias must have dtype that of the result"):
        ops.w_int8_linear(code, scale, zero, rest[0], rest[1].float(), *rest[2:])
    with pytest.raises(RuntimeError, match="bits must be 2 to 8"):
        ops.quantize_activation(torch.zeros(1, 16, device="cuda"), None, 9, False)
    with pytest.raises(RuntimeError, match="perm must have shape"):
        ops.quantize_activation(torch.zeros(1, 16, device="cuda"), torch.zeros(3, dtype=torch.int32).cuda(), 8, False)


def test_opcheck() -> None:
    code, scale, zero, *rest = Problem(LAYOUTS[13], 3, F16).arguments()
    torch.library.opcheck(ops.w_int8_linear, (code, scale, zero, *rest))
    torch.library.opcheck(ops.quantize_activation, (torch.randn(2, 3, 100, device="cuda"), None, 8, False))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu() -> None:
    problem = Problem(LAYOUTS[1], 5, F16)
    on_second = [a.to("cuda:1") if isinstance(a, Tensor) else a for a in problem.arguments()]
    assert torch.equal(ops.w_int8_linear(*on_second).cpu(), problem.expected())
    with pytest.raises(RuntimeError, match="packed is on cuda:1"):
        ops.w_int8_linear(*problem.arguments()[:3], *on_second[3:])
