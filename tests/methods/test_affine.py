"""RTN and GPTQ."""

import pytest
import torch

from hf_spqr.errors import ConfigError, NonFiniteError
from hf_spqr.formats import affine as affine_format
from hf_spqr.methods import gptq, rtn
from hf_spqr.methods.base import AffineParams
from tests.methods.layers import output_error, random_layer

FIELDS = [
    {},
    {"bits": 2, "group_size": 16},
    {"bits": 3, "group_size": -1},
    {"bits": 8, "group_size": 32, "scale_dtype": torch.bfloat16},
    {"bits": 4, "group_size": 64, "symmetric": True},
    {"bits": 3, "group_size": -1, "symmetric": True, "scale_dtype": torch.bfloat16},
    {"bits": 4, "group_size": 16, "act_order": True},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("shape", [(48, 160), (37, 150), (1, 5)], ids=str)
def test_any_shape(fields, shape):
    weight, hessian = random_layer(*shape)
    params = AffineParams(**fields)
    plain, better = rtn.quantize(weight, params, hessian), gptq.quantize(weight, hessian, params)
    for result in (plain, better):
        restored = affine_format.unpack(result.weight.layout, affine_format.pack(result.weight)).dequantize()
        assert torch.equal(restored, result.weight.dequantize())
        assert result.error == pytest.approx(output_error(weight, restored, hessian), rel=1e-3, abs=1e-6)
    assert plain.weight.perm is None
    assert (better.weight.perm is not None) == params.act_order
    if shape[0] > 1:
        assert better.error < plain.error


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rtn_by_hand(symmetric, bits):
    weight, _ = random_layer(6, 40)
    weight[0, :16] = weight[0, :16].abs() + 0.01  # a group without zero inside its range
    params = AffineParams(bits=bits, group_size=16, symmetric=symmetric)
    restored = rtn.quantize(weight, params).weight.dequantize()
    top = 2**bits - 1
    for row in range(6):
        for start in range(0, 40, 16):
            group = weight[row, start : start + 16]
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            if symmetric:
                low, high = -max(-low, high), max(-low, high)
            scale = torch.tensor((high - low) / top).half().float()
            zero = 2 ** (bits - 1) if symmetric else torch.round(-low / scale)
            expected = scale * ((group / scale + zero).round().clamp(0, top) - zero)
            torch.testing.assert_close(restored[row, start : start + 16], expected)


def test_error_of_the_weight_without_a_hessian():
    weight, _ = random_layer(16, 32)
    result = rtn.quantize(weight, AffineParams(group_size=16))
    assert result.error == pytest.approx(float((result.weight.dequantize() - weight).norm() / weight.norm()))


def test_zero_weight():
    _, hessian = random_layer(4, 32)
    for result in (
        rtn.quantize(torch.zeros(4, 32), AffineParams(group_size=16)),
        gptq.quantize(torch.zeros(4, 32), hessian, AffineParams(group_size=16)),
    ):
        assert result.error == 0 and not result.weight.dequantize().any()


def test_non_finite():
    weight, hessian = random_layer(4, 32)
    weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="weight"):
        rtn.quantize(weight, AffineParams())
    with pytest.raises(NonFiniteError, match="weight"):
        gptq.quantize(weight, hessian, AffineParams())


@pytest.mark.parametrize("fields", [{"bits": 1}, {"group_size": 12}, {"percdamp": -1}, {"scale_dtype": torch.float32}])
def test_bad_parameters(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        AffineParams(**fields)
