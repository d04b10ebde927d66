"""The ops of many experts refuse rows and ends that do not fit. What they compute: tests/nn/test_experts.py."""

import pytest
import torch

from hf_spqr import ops
from hf_spqr.formats import affine, spqr
from tests.weights import random_affine, random_spqr

EXPERTS, ROWS, OUT, IN = 3, 7, 33, 100


def affine_arguments():
    layout = affine.AffineLayout(OUT, IN, 4, 32)
    experts = [affine.pack(random_affine(layout, seed=e)) for e in range(EXPERTS)]
    return torch.stack([e["packed"] for e in experts]), None, OUT, IN, 4, 32, False, False


def spqr_arguments():
    layout = spqr.SpQRLayout(OUT, IN)
    experts = [spqr.pack(random_spqr(layout, seed=e)) for e in range(EXPERTS)]
    packed, outlier_row = (torch.stack([e[name] for e in experts]) for name in ("packed", "outlier_row"))
    return packed, outlier_row, torch.cat([e["outlier"] for e in experts]), None, OUT, IN, 3, 16, 3, 16


OPS = {
    "spqr": lambda x, ends, back=False: ops.spqr_grouped_linear(x, ends, *spqr_arguments(), False, back),
    "affine": lambda x, ends, back=False: ops.affine_grouped_linear(x, ends, *affine_arguments(), False, back),
    "integer": lambda x, ends: ops.integer_grouped_linear(x, ends, *affine_arguments(), 8, False),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([2, 2, 9], r"ends must rise from 0 on and end at or before row 7, got \[2, 2, 9\]"),
        ([4, 2, 7], "ends must rise"),
        ([-1, 2, 7], "ends must rise"),
        ([2, 7], r"ends must be torch.int64 \[3\], got torch.int64 \[2\]"),
        ([1, 2, 3, 7], r"ends must be torch.int64 \[3\]"),
        ([2.0, 2.0, 7.0], r"ends must be torch.int64 \[3\], got torch.float32"),
    ],
)
def test_ends_that_fit_no_rows(op, ends, message):
    with pytest.raises(ValueError, match=message):
        OPS[op](torch.randn(ROWS, IN), torch.tensor(ends))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(ROWS, IN - 1), (1, ROWS, IN), (IN,)])
def test_rows_of_another_shape(op, shape):
    """One column less has the same packed bytes, so that no kernel would notice."""
    with pytest.raises(ValueError, match=r"x must be \[rows, 100\], got"):
        OPS[op](torch.randn(shape), torch.tensor([2, 2, 7]))


@pytest.mark.parametrize("op", ["spqr", "affine"])
def test_rows_of_the_gradient(op):
    ends = torch.tensor([0, 0, 0])
    assert OPS[op](torch.randn(0, OUT), ends, True).shape == (0, IN)
    with pytest.raises(ValueError, match=r"x must be \[rows, 33\], got \[0, 100\]"):
        OPS[op](torch.randn(0, IN), ends, True)
