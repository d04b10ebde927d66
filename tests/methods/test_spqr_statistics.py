"""Two-level statistics: everything a decoder sees is what the file can store."""

import pytest
import torch

from hf_spqr.methods.spqr_statistics import encode, encode_weighted


def decoded(coded):
    step, offset = coded.step.half().float(), coded.offset.half().float()
    return step.repeat_interleave(16) * (coded.codes - offset.repeat_interleave(16))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("fit", [encode, lambda values, bits: encode_weighted(values, torch.rand_like(values), bits)])
def test_values_are_what_a_decoder_computes(groups, bits, fit):
    torch.manual_seed(0)
    values = 0.01 * torch.rand(groups, 64) + 0.003
    coded = fit(values, bits)
    assert torch.equal(coded.codes, coded.codes.round()) and 0 <= coded.codes.min() and coded.codes.max() < 2**bits
    assert torch.equal(coded.value, decoded(coded))
    step = coded.step.repeat_interleave(16)
    if fit is encode:
        assert ((coded.value - values).abs() <= 0.51 * step).all()


def test_groups_of_a_unit_share_the_second_level():
    values = torch.rand(2, 32)
    coded = encode(values, 3)
    assert coded.step.shape == (2,)
    spread = values.view(2, 2, 16).amax((0, 2)) - values.view(2, 2, 16).amin((0, 2))
    torch.testing.assert_close(coded.step, spread / 7, rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.02, -3.5, 1e-7])
def test_equal_values(value):
    coded = encode(torch.full((1, 16), value), 3)
    torch.testing.assert_close(coded.value, torch.full((1, 16), value), rtol=2e-3, atol=1e-6)


def test_weighted_fit_never_loses():
    torch.manual_seed(1)
    for _ in range(20):
        values, importance = torch.rand(2, 64).square(), torch.rand(2, 64).square()

        def loss(coded, values=values, importance=importance):
            return float(((coded.value - values).square() * importance).sum())

        assert loss(encode_weighted(values, importance, 3)) <= loss(encode(values, 3)) * (1 + 1e-6)


def test_values_without_importance_have_no_say():
    values = torch.linspace(1, 2, 16)[None].clone()
    importance = torch.ones(1, 16)
    importance[0, 3], values[0, 3] = 0.0, 1e4
    coded = encode_weighted(values, importance, 3)
    assert coded.value.max() < 2.2


def test_replace():
    coded = encode(torch.rand(2, 32), 3)
    codes = torch.randint(0, 8, (32,)).float()
    coded.replace(1, codes)
    assert torch.equal(coded.codes[1], codes) and torch.equal(coded.value, decoded(coded))
