"""The grid of a token: what its codes may be."""

import pytest
import torch

from hf_spqr.formats.tokens import code_range, fake_quantize_activation, token_grid


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_codes_are_as_many_as_the_bits_say(bits: int) -> None:
    assert code_range(bits, symmetric=False) == (0, 2**bits - 1)
    assert code_range(bits, symmetric=True) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_both_ends_of_a_token_are_codes(symmetric: bool) -> None:
    x = torch.tensor([[-3.0, 0.0, 1.0, 12.0], [5.0, 6.0, 7.0, 8.0], [-4.0, -3.0, -2.0, -1.0]])
    scale, zero = token_grid(x, 4, symmetric)
    steps = (x / scale).round() + zero
    low, high = code_range(4, symmetric)
    assert steps.min() == (-7 if symmetric else low) and steps.max() == high
    expected = [12 / 7, 8 / 7, 4 / 7] if symmetric else [15 / 15, 8 / 15, 4 / 15]
    torch.testing.assert_close(scale[:, 0], torch.tensor(expected))
    assert (fake_quantize_activation(x, 4, symmetric) - x).abs().le(scale / 2 + 1e-6).all()
