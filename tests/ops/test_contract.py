"""What torch expects of an op, gradients, and messages for wrong arguments."""

import pytest
import torch

from hf_spqr import ops
from hf_spqr.formats import affine, spqr
from tests.ops.cases import affine_case, spqr_case
from tests.ops.conftest import ISAS

compiled = pytest.mark.skipif(not ops.COMPILED, reason="needs the compiled kernels")


def cases():
    return (
        spqr_case(spqr.SpQRLayout(33, 100), perm=True),
        spqr_case(spqr.SpQRLayout(33, 100, bits=4, group_size=-1), share=0),
        affine_case(affine.AffineLayout(33, 100, 4, 32), perm=True),
        affine_case(affine.AffineLayout(33, 100, 3, -1, symmetric=True)),
    )


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float32), (70, torch.bfloat16)])
def test_opcheck(tokens, dtype):
    for index, case in enumerate(cases()):
        x = torch.randn(2, tokens, 100).to(dtype).requires_grad_()
        bias = torch.randn(33, dtype=dtype) if index % 2 else None
        torch.library.opcheck(case.linear, (x, *case.tensors, bias, 33, *case.numbers))
        torch.library.opcheck(case.dequantize, (*case.tensors, 33, 100, *case.numbers, dtype))


def test_gradient_of_x_and_bias():
    for case in cases():
        x = torch.randn(2, 3, 100, requires_grad=True)
        bias = torch.randn(33, requires_grad=True)
        grad = torch.randn(2, 3, 33)
        case.run(x, bias).backward(grad)
        torch.testing.assert_close(x.grad, grad @ case.weight, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


def test_compiles_without_breaks():
    case = cases()[0]
    run = torch.compile(lambda x: case.run(x) * 2, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 100)
    torch.testing.assert_close(run(x), case.run(x) * 2)


@compiled
def test_lowering_the_instruction_set():
    best = torch.ops.hf_spqr.set_cpu_isa(ISAS[0])
    try:
        assert torch.ops.hf_spqr.cpu_isa() == ISAS[0]
    finally:
        torch.ops.hf_spqr.set_cpu_isa(best)
    assert torch.ops.hf_spqr.cpu_isa() == best
    with pytest.raises(RuntimeError, match="unknown instruction set"):
        torch.ops.hf_spqr.set_cpu_isa("mmx")


SPQR = {"x": 0, "packed": 1, "outlier_row": 2, "outlier": 3, "perm": 4, "bias": 5, "out_features": 6, "bits": 7}
SPQR |= {"group_size": 8, "stat_bits": 9, "second_group": 10}


@compiled
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("x", torch.zeros(2, 100, dtype=torch.float64), "x must be float32, bfloat16 or float16"),
        ("x", torch.zeros(2, 612), "packed must have shape"),
        ("x", torch.zeros(()), "x must have at least one dimension"),
        ("packed", torch.zeros(3, 128), "packed must have dtype int32"),
        ("packed", torch.zeros(2, 64, dtype=torch.int32), r"packed must have shape \[3, "),
        ("outlier_row", torch.zeros(34), "outlier_row must have dtype int32"),
        ("outlier_row", torch.zeros(33, dtype=torch.int32), r"outlier_row must have shape .* = \[34\]"),
        ("outlier_row", torch.zeros(34, dtype=torch.int32), "outlier_row must rise from 0 to the number of outliers"),
        ("outlier_row", "falls", "outlier_row must rise from 0 to the number of outliers"),
        ("outlier", torch.zeros(5, dtype=torch.int64), "outlier must have dtype int32"),
        ("perm", torch.zeros(100, dtype=torch.int64), "perm must have dtype int32"),
        ("perm", torch.zeros(99, dtype=torch.int32), r"perm must have shape .* = \[100\]"),
        ("bias", torch.zeros(32), r"bias must have shape .* = \[33\]"),
        ("bias", torch.zeros(33, dtype=torch.bfloat16), "bias must have the dtype of x"),
        ("out_features", 0, "out_features must be positive"),
        ("bits", 9, "bits must be 2 to 8, got 9"),
        ("group_size", 24, "group_size must be 8, 16, 32, 64, 128 or -1"),
        ("stat_bits", 1, "stat_bits must be 2 to 8"),
        ("second_group", 48, "second_group must be 16 or 32"),
    ],
)
def test_wrong_arguments_are_named(argument, value, message):
    case = cases()[0]
    arguments = [torch.zeros(2, 100), *case.tensors, torch.zeros(33), 33, *case.numbers]
    if value == "falls":
        value = case.tensors[1].clone()
        value[5] = value[10] + 1
    arguments[SPQR[argument]] = value
    with pytest.raises(RuntimeError, match=f"spqr_linear: {message}"):
        case.linear(*arguments)


@compiled
def test_strided_packed_weights_are_refused():
    case = cases()[2]
    packed = case.tensors[0].repeat_interleave(2, 1)[:, ::2]
    with pytest.raises(RuntimeError, match="affine_linear: packed must be contiguous"):
        case.linear(torch.zeros(1, 100), packed, None, None, 33, *case.numbers)


@compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_reading_memory_touches_all_of_it(threads):
    """The benchmark's measure of bandwidth: exclusive or over all words, so that no read can be left out."""
    data = torch.randint(-(2**31), 2**31 - 1, (64 * 10000,), dtype=torch.int32)
    expected = 0
    for word in data.view(64, -1).numpy().view("uint32").ravel().tolist():
        expected ^= word
    torch.set_num_threads(threads)
    assert torch.ops.hf_spqr.read_memory(data) == expected
    with pytest.raises(RuntimeError, match="read_memory: data must be int32"):
        torch.ops.hf_spqr.read_memory(data.float())
