"""The Hessian of a shared input."""

import pytest
import torch

from hf_spqr.calibration.hessian import HessianAccumulator
from hf_spqr.errors import CalibrationError, NonFiniteError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_over_all_tokens(dtype):
    torch.manual_seed(0)
    batches = [torch.randn(2, 7, 12).to(dtype), torch.randn(30, 12).to(dtype), torch.randn(0, 12).to(dtype)]
    accumulator = HessianAccumulator(12)
    for batch in batches:
        accumulator.add(batch)
    x = torch.cat([b.reshape(-1, 12).double() for b in batches])
    assert accumulator.tokens == 44
    hessian = accumulator.hessian()
    torch.testing.assert_close(hessian, (2 / 44 * x.T @ x).float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(hessian, hessian.T) and hessian.dtype == torch.float32


def test_many_small_batches_do_not_drift():
    torch.manual_seed(0)
    x = 100 + torch.randn(5000, 4)
    accumulator = HessianAccumulator(4)
    for row in x:
        accumulator.add(row)
    torch.testing.assert_close(
        accumulator.hessian(), (2 / 5000 * x.double().T @ x.double()).float(), rtol=1e-6, atol=0
    )


def test_no_tokens():
    with pytest.raises(CalibrationError, match="No calibration input"):
        HessianAccumulator(3).hessian()


def test_wrong_width():
    with pytest.raises(CalibrationError, match="width 3"):
        HessianAccumulator(3).add(torch.randn(2, 4))


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (1e30, "too large")])
def test_non_finite(value, what):
    x = torch.randn(5, 3)
    x[2, 1] = value
    with pytest.raises(NonFiniteError, match=what):
        HessianAccumulator(3).add(x)
