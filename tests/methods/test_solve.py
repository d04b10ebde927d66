"""Factor of the inverse Hessian, and what happens when Cholesky fails."""

import pytest
import torch

from hf_spqr.errors import CalibrationError
from hf_spqr.methods.solve import damped, inverse_factor, invert_upper
from tests.methods.layers import random_layer


@pytest.mark.parametrize("size", [1, 7, 64, 65, 200])
def test_factor_of_the_inverse(size):
    _, hessian = random_layer(1, size)
    factor = inverse_factor(hessian.double(), 0.01)
    assert (factor.percdamp, factor.raised) == (0.01, False)
    upper = factor.upper
    torch.testing.assert_close(upper, upper.triu())
    inverse = torch.linalg.inv(damped(hessian.double(), 0.01))
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 64, 65, 130, 333])
def test_inverse_of_a_triangle(size):
    torch.manual_seed(size)
    matrix = torch.randn(size, size, dtype=torch.float64).triu() / size + torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(invert_upper(matrix) @ matrix, torch.eye(size, dtype=torch.float64))


def test_ladder_raises_the_damping_of_a_singular_matrix():
    _, hessian = random_layer(1, 64, tokens=5)
    factor = inverse_factor(hessian - 1e-3 * hessian.diagonal().mean() * torch.eye(64), 0.0)
    assert factor.raised and factor.percdamp >= 1e-3
    assert torch.isfinite(factor.upper).all()


def test_dead_inputs_need_no_damping():
    hessian = torch.diag(torch.tensor([4.0, 0.0, 1.0]))
    factor = inverse_factor(hessian, 0.0)
    assert not factor.raised
    torch.testing.assert_close(factor.upper, torch.diag(torch.tensor([0.5, 1.0, 1.0])))


def test_all_dead():
    assert torch.equal(inverse_factor(torch.zeros(3, 3), 0.01).upper, torch.eye(3))


def test_not_a_hessian():
    with pytest.raises(CalibrationError, match="not positive definite"):
        inverse_factor(-torch.eye(4), 0.01)
