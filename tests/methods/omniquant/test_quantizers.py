from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_spqr.formats.affine import AffineWeight, pack, unpack
from hf_spqr.formats.tokens import fake_quantize_activation, token_grid
from hf_spqr.methods.omniquant import OmniQuantParams
from hf_spqr.methods.omniquant.quantizers import fake_quantize, make_quantizer, quantize_tokens

KINDS = {
    "nearest": OmniQuantParams(bits=3, group_size=32, rounding=False, lwc=False),
    "clipping": OmniQuantParams(bits=2, group_size=32, rounding=False),
    "rounding": OmniQuantParams(bits=4, group_size=32),
    "symmetric": OmniQuantParams(bits=4, group_size=32, sym=True),
    "channel": OmniQuantParams(bits=3, scale_dtype=torch.bfloat16),
    "wide": OmniQuantParams(bits=4, group_size=128),
    "ragged": OmniQuantParams(bits=3, group_size=64),
}


def straight(value: Tensor) -> Tensor:
    return value + (value.round() - value).detach()


def plain_fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, qmax: int, offset: Tensor) -> Tensor:
    steps = straight(weight / scale + offset) + zero
    inside = (steps >= 0) & (steps <= qmax)
    clamped = torch.where(inside, steps, steps.detach().clamp(0, qmax))
    return (clamped - zero) * scale


def test_gradients_equal_those_of_plain_autograd() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(6, 4, 16), torch.rand(6, 4, 1) * 0.3 + 0.05, torch.randint(0, 8, (6, 4, 1)).float()]
    inputs.append(torch.rand(6, 4, 16) - 0.5)
    upstream = torch.randn(6, 4, 16)
    grads = []
    for function in (fake_quantize, plain_fake_quantize):
        leaves = [x.clone().requires_grad_() for x in inputs]
        weight, scale, zero, offset = leaves
        out = function(weight, scale, zero, 7, offset)
        out.backward(upstream)
        grads.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_what_the_packed_weight_dequantizes_to(kind: str) -> None:
    torch.manual_seed(1)
    params = KINDS[kind]
    weight = torch.randn(48, 96)
    quantizer = make_quantizer(weight, params)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        quantizer.clamp_()
        seen = quantizer(weight)
    codes, scales, zeros = quantizer.export(weight)
    assert codes.dtype == torch.uint8 and int(codes.max()) <= 2**params.bits - 1
    packed = pack(AffineWeight(quantizer.layout, codes, scales, zeros))
    assert torch.equal(unpack(quantizer.layout, packed).dequantize(), seen)


@pytest.mark.parametrize("kind", ["clipping", "rounding"])
def test_remembering_the_ranges_changes_nothing(kind: str) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    quantizer = make_quantizer(weight, KINDS[kind])
    before = quantizer(weight)
    quantizer.fix(weight)
    assert torch.equal(quantizer(weight), before)


def test_groups_of_one_sign_keep_their_zero_point_in_range() -> None:
    weight = torch.rand(16, 64) + 3.0
    for sign in (1, -1):
        quantizer = make_quantizer(sign * weight, KINDS["clipping"])
        _, _, zeros = quantizer.export(sign * weight)
        assert zeros is not None and int(zeros.max()) <= 3
        assert (quantizer(sign * weight) - sign * weight).abs().max() < 1.5


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", [{"rounding": False, "lwc": False}, {"rounding": True}])
def test_symmetric_grids_reach_the_largest_weight_of_either_sign(kind: dict[str, bool], sign: int) -> None:
    weight = sign * torch.tensor([[1.4, -0.05, 0.2, 0.6] * 8])
    quantizer = make_quantizer(weight, OmniQuantParams(bits=4, group_size=32, sym=True, **kind))
    codes, scales, zeros = quantizer.export(weight)
    assert zeros is None and scales.item() == pytest.approx(0.2, rel=1e-3)
    assert (codes[0, :4].int() - 8).tolist() == [sign * 7, 0, sign, sign * 3]


def test_nothing_overflows_on_extreme_weights() -> None:
    weight = torch.zeros(16, 64)
    weight[0, 0], weight[1, 1], weight[2] = 3e5, -1e-12, 0
    for params in (*KINDS.values(), replace(KINDS["rounding"], bits=8)):
        quantizer = make_quantizer(weight, params)
        out = quantizer(weight)
        out.sum().backward() if out.requires_grad else None
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(p.grad).all() for p in quantizer.parameters() if p.grad is not None)


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_tokens(bits: int) -> None:
    """The gradient is that of the same formula written out, the rounding passed straight through."""
    x = torch.randn(2, 5, 32) * torch.logspace(-3, 3, 5)[None, :, None]
    leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = quantize_tokens(leaf, bits, symmetric=True)
    assert torch.equal(out, fake_quantize_activation(x, bits, symmetric=True))
    step = plain.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    ratio = plain / step
    upstream = torch.randn_like(out)
    out.backward(upstream)
    (step * (ratio + (ratio.round() - ratio).detach())).backward(upstream)
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_are_quantized_on_their_own_grid(bits: int) -> None:
    x = torch.randn(2, 5, 32) * torch.logspace(-3, 3, 5)[None, :, None]
    x[0, 0] = x[0, 0].abs()
    scale, zero = token_grid(x, bits)
    assert float(zero.min()) >= 0 and float(zero.max()) <= 2**bits - 1
    leaf = x.clone().requires_grad_()
    out = quantize_tokens(leaf, bits)
    assert torch.equal(out, fake_quantize_activation(x, bits))
    assert ((out - x).abs() <= scale * 0.51 + scale * (zero - -x.amin(-1, keepdim=True) / scale).abs()).all()
    upstream = torch.randn_like(out)
    out.backward(upstream)
    plain = x.clone().requires_grad_()
    low, high = plain.amin(-1, keepdim=True).clamp(max=0), plain.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    ratio = plain / step
    rounded = ((ratio.round() + zero).clamp(0, 2**bits - 1) - zero).detach()
    (step * (ratio + (rounded - ratio).detach())).backward(upstream)
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-2, atol=1e-2)
