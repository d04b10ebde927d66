"""Layers that quantize their input: the product is the one of the integers."""

import pytest
import torch

from hf_spqr import ops
from hf_spqr.formats import affine
from hf_spqr.formats.affine import AffineLayout, AffineWeight
from hf_spqr.formats.tokens import fake_quantize_activation, token_grid
from hf_spqr.nn import AffineGroupedLinear, AffineLinear
from tests.weights import random_affine

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(group_size: int, act_bits: int = 8, act_sym: bool = False, bias: bool = True) -> AffineLinear:
    weight = random_affine(AffineLayout(48, 96, 4, group_size), perm=True)
    module = AffineLinear.from_weight(weight, torch.randn(48) if bias else None, torch.float32)
    module.act_bits, module.act_sym = act_bits, act_sym
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_it_is_the_product_of_integers(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout = AffineLayout(48, 96, bits)
    codes = torch.randint(0, 2**bits, (48, 96), dtype=torch.uint8)
    scales = torch.rand(48, 1).half() * 0.1 + 0.01
    zeros = torch.randint(0, 2**bits, (48, 1), dtype=torch.uint8)
    module = AffineLinear.from_weight(AffineWeight(layout, codes, scales, zeros), None, dtype)
    x = torch.randn(2, 5, 96).to(dtype)
    plain = module(x)
    module.act_bits = bits
    scale, zero = token_grid(x, bits)
    steps = ((x.float() / scale).round() + zero).clamp(0, 2**bits - 1).long() - zero.long()
    sums = steps @ (codes.long() - zeros.long()).T  # exact
    out = module(x)
    assert out.dtype == dtype and not torch.equal(out, plain)
    assert torch.equal(out, (sums.float() * (scale * scales.float().T)).to(dtype))
    assert f"act_bits={bits}" in repr(module) and "act_sym" not in repr(module)


@pytest.mark.parametrize("act_sym", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_fake_quantization_says(dtype: torch.dtype, group_size: int, act_sym: bool) -> None:
    module, x = layer(group_size, 6, act_sym), torch.randn(7, 96).to(dtype)
    steps = fake_quantize_activation(x.float(), 6, act_sym)
    expected = steps @ module.dequantize_weight().T + module.bias.to(dtype)
    allowed = 1e-5 if dtype == torch.float32 else 2**-8
    assert (module(x) - expected).abs().max() <= allowed * expected.abs().max()


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_backend_gives_the_same_bits(dtype: torch.dtype, group_size: int) -> None:
    module, x = layer(group_size), torch.randn(3, 7, 96).to(dtype)
    y = module(x)
    module.backend = "reference"
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_the_gradient_goes_straight_through(group_size: int, backend: str) -> None:
    module = layer(group_size)
    module.backend = backend
    module.bias.requires_grad_()
    x, grad = torch.randn(3, 5, 96, requires_grad=True), torch.randn(3, 5, 48)
    y = module(x)
    with torch.no_grad():
        assert torch.equal(y, module(x))
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ module.dequantize_weight(torch.float32))
    torch.testing.assert_close(module.bias.grad, grad.sum((0, 1)))


def test_it_compiles_without_breaks() -> None:
    module, x = layer(-1), torch.randn(3, 96, requires_grad=True)
    compiled = torch.compile(lambda x: module(x) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x) * 2)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * module.dequantize_weight(torch.float32).sum(0).expand(3, 96))


def experts(group_size: int, act_sym: bool = False) -> tuple[AffineGroupedLinear, list[AffineLinear]]:
    singles = [layer(group_size, 8, act_sym, bias=False) for _ in range(4)]
    for seed, single in enumerate(singles):
        weight = random_affine(single.layout, True, seed)
        single.packed.data, single.perm.data = affine.pack(weight).values()
    joined = AffineGroupedLinear.join(singles[0].layout, [single.packed_tensors() for single in singles])
    joined.act_bits, joined.act_sym = 8, act_sym
    return joined, singles


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("act_sym", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
def test_experts_are_layers_side_by_side(group_size: int, act_sym: bool, backend: str) -> None:
    joined, singles = experts(group_size, act_sym)
    joined.backend = backend
    x, ends = torch.randn(9, 96, requires_grad=True), torch.tensor([2, 2, 5, 8])
    y = joined(x, ends)
    owners = [0, 0, 2, 2, 2, 3, 3, 3]
    assert torch.equal(y[:8], torch.stack([singles[owner](row) for owner, row in zip(owners, x, strict=False)]))
    assert not y[8:].any()
    grad = torch.randn(9, 48)
    y.backward(grad)
    weight = joined.dequantize_weight(torch.float32)
    torch.testing.assert_close(x.grad[:8], torch.einsum("so,soi->si", grad[:8], weight[owners]), rtol=1e-4, atol=1e-4)
    assert not x.grad[8:].any()
    assert "act_bits=8" in repr(joined) and ("act_sym=True" in repr(joined)) == act_sym


def test_opcheck_of_experts() -> None:
    joined, _ = experts(-1)
    x, ends = torch.randn(9, 96, requires_grad=True), torch.tensor([2, 2, 5, 8])
    arguments = (x, ends, joined.packed, joined.perm, 48, 96, *joined._numbers, 8, False)
    torch.library.opcheck(ops.integer_grouped_linear, arguments)
