"""Packed modules: the same function as their dequantized matrix, and the manners of an ``nn.Linear``."""

import copy

import pytest
import torch
from torch import nn

from hf_spqr.errors import CheckpointError
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout
from hf_spqr.nn import AffineLinear, SpQRLinear
from tests.weights import random_affine, random_spqr


def spqr_module(n=48, k=96, bias=True, perm=True, dtype=torch.float32, share=0.05, **layout) -> SpQRLinear:
    weight = random_spqr(SpQRLayout(n, k, **layout), share, perm)
    return SpQRLinear.from_weight(weight, torch.randn(n, dtype=dtype) if bias else None, dtype)


def affine_module(n=48, k=96, bias=True, perm=False, dtype=torch.float32, bits=4, group_size=32) -> AffineLinear:
    weight = random_affine(AffineLayout(n, k, bits, group_size), perm)
    return AffineLinear.from_weight(weight, torch.randn(n, dtype=dtype) if bias else None, dtype)


MODULES = [spqr_module, affine_module]


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_is_the_linear_of_the_dequantized_weight(make, bias, backend):
    module = make(bias=bias)
    module.backend = backend
    x = torch.randn(2, 5, 96)
    expected = nn.functional.linear(x.double(), module.dequantize_weight().double())
    if bias:
        expected += module.bias.double()
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    torch.testing.assert_close(module.to_linear()(x), module(x), rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("make", MODULES)
def test_inputs_of_another_width_are_refused(make, act_bits, backend):
    """One column less has the same packed bytes, so that no op would notice."""
    module = make(perm=False)
    module.act_bits, module.backend = act_bits, backend
    for x in (torch.randn(2, 95), torch.randn(2, 97), torch.randn(2, 0)):
        with pytest.raises(ValueError, match="x must have in_features=96 columns in its last dimension, got"):
            module(x)


@pytest.mark.parametrize("make", MODULES)
def test_int8_activations_are_a_matter_of_the_op(make):
    """Eager, compiled and with gradients; how far from the exact result is a matter of the kernels."""
    module = make(bias=False)
    module.backend = "int8_activations"
    x = torch.randn(5, 96, requires_grad=True)
    tensors = [getattr(module, name) for name in (*module.tensor_names, "perm", "bias")]
    expected = type(module).linear(x.detach(), *tensors, 48, *module._numbers, True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for run in (module, compiled):
        assert torch.equal(run(x), expected)
        with torch.no_grad():
            assert torch.equal(run(x), expected)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.dequantize_weight().sum(0).expand(5, 96))


@pytest.mark.parametrize("tokens", [5, 100])
@pytest.mark.parametrize(("make", "act_bits"), [(spqr_module, None), (affine_module, None), (affine_module, 8)])
def test_the_result_may_be_changed_in_place(make, act_bits, tokens):
    """As Longformer does with its queries; autograd forbids it for views."""
    module = make(perm=False, **({} if act_bits is None else {"group_size": -1}))
    module.act_bits = act_bits
    x = torch.randn(2, tokens, 96, requires_grad=True)
    y = module(x)
    y /= 2
    y.sum().backward()
    torch.testing.assert_close(x.grad, module.dequantize_weight().sum(0).expand_as(x) / 2)


def test_quantized_activations_stay_as_they_are():
    module = affine_module(group_size=-1)
    module.act_bits = 8
    x = torch.randn(5, 96)
    expected = module(x)
    module.backend = "int8_activations"
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("make", MODULES)
def test_casts_leave_packed_tensors_alone(make):
    module = make()
    before = {name: tensor.clone() for name, tensor in module.packed_tensors().items()}
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float(), lambda m: m.double()):
        cast(module)
        for name, tensor in module.packed_tensors().items():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    module.to(torch.bfloat16)
    assert module.weight.dtype == module.bias.dtype == torch.bfloat16
    assert module(torch.randn(3, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("make", MODULES)
def test_a_bias_of_another_dtype_is_cast(make):
    module = make(dtype=torch.bfloat16)
    x = torch.randn(3, 96)
    expected = nn.functional.linear(x, module.dequantize_weight(torch.float32), module.bias.float())
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("tokens", [(), (4,), (2, 3)])
@pytest.mark.parametrize("make", MODULES)
def test_gradient_reaches_the_input_and_the_bias_but_not_the_weight(make, tokens):
    module = make()
    module.bias.requires_grad_(True)
    x = torch.randn(*tokens, 96, requires_grad=True)
    seed = torch.randn(*tokens, 48)
    (module(x) * seed).sum().backward()
    torch.testing.assert_close(x.grad, seed @ module.dequantize_weight())
    torch.testing.assert_close(module.bias.grad, seed.reshape(-1, 48).sum(0))
    assert module.packed.grad is None and not module.packed.requires_grad


@pytest.mark.parametrize("make", MODULES)
def test_compiles_in_one_graph_with_and_without_gradient(make):
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 96, requires_grad=True)
    torch.testing.assert_close(compiled(x), module(x))
    compiled(x).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("make", MODULES)
def test_state_dict_and_deepcopy_keep_every_bit(make):
    module = make(perm=True)
    other = copy.deepcopy(module)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 96)
    assert torch.equal(other(x), module(x))
    assert set(module.state_dict()) == {*type(module).tensor_names, "perm", "weight", "bias"}
    assert module.weight.numel() == 0


@pytest.mark.parametrize("make", MODULES)
def test_empty_builds_the_same_shapes_on_meta(make):
    module = make(perm=True)
    specs = {name: (tuple(t.shape), t.dtype) for name, t in module.packed_tensors().items()}
    empty = type(module).empty(module.layout, specs, dtype=torch.float16)
    assert {name: (tuple(t.shape), t.dtype) for name, t in empty.packed_tensors().items()} == specs
    assert empty.packed.is_meta and empty.weight.dtype == torch.float16 and empty.nbytes() == module.nbytes()
    specs.pop("packed")
    with pytest.raises(CheckpointError, match="no tensor 'packed'"):
        type(module).empty(module.layout, specs)


def test_empty_refuses_a_shape_that_does_not_fit():
    with pytest.raises(CheckpointError, match="should be"):
        AffineLinear.empty(AffineLayout(32, 64, 4, 32), {"packed": ((2, 7), torch.int32)})


def test_check_finds_indices_that_would_read_out_of_bounds():
    module = spqr_module()
    module.check()
    module.outlier.data[0] |= 0xFFFF
    with pytest.raises(CheckpointError, match="beyond the last column"):
        module.check()
    module = spqr_module()
    module.perm.data[0] = module.perm.data[1]
    with pytest.raises(CheckpointError, match="perm"):
        module.check()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_check_finds_zero_points_that_no_code_has(bits):
    """Those of whole rows have 16 bits, of which kernels take all and the reference eight."""
    module = affine_module(bits=bits, group_size=-1)
    module.check()
    for flag in (1 << 16 + bits, -(2**31)):
        damaged = copy.deepcopy(module)
        damaged.packed.data[2, 7] |= flag
        with pytest.raises(CheckpointError, match=f"a zero point does not fit {bits} bits"):
            damaged.check()


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_refuses_indices_that_would_read_out_of_bounds(assign):
    module = spqr_module()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=assign)
    state["outlier"][0] |= 0xFFFF
    with pytest.raises(RuntimeError, match="beyond the last column"):
        module.load_state_dict(state, assign=assign)


@pytest.mark.parametrize("make", [spqr_module, affine_module])
def test_check_finds_statistics_that_are_not_finite(make):
    module = make()
    module.packed.data.fill_(-1)  # NaN in every dtype
    with pytest.raises(CheckpointError, match=r"damaged packed layer: .* infinite or NaN"):
        module.check()


def test_repr_tells_the_bits_that_the_bytes_take():
    module = spqr_module(256, 256, perm=False, share=0.05)
    assert f"bits_per_weight={8 * module.nbytes() / 65536:.3f}" in repr(module)
    assert f"outliers={module.outlier.numel() / 65536:.2%}" in repr(module)
