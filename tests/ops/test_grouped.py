"""The ops of many experts refuse arguments that do not fit. What they compute: tests/nn/test_experts.py."""

import pytest
import torch

from hf_spqr import ops
from hf_spqr.formats import affine, spqr
from hf_spqr.ops import grouped
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


MORE = [0, 1, 2, 2]
FEWER = [0, 1]
SPQR_OPS = {"compiled": ops.spqr_grouped_linear, "reference": grouped.reference_spqr_grouped_linear}
AFFINE_OPS = {"compiled": ops.affine_grouped_linear, "reference": grouped.reference_affine_grouped_linear}
INTEGER_OPS = {"compiled": ops.integer_grouped_linear, "reference": grouped.reference_integer_grouped_linear}


@pytest.mark.parametrize("kind", SPQR_OPS)
@pytest.mark.parametrize("experts", [MORE, FEWER])
def test_tensors_of_another_number_of_experts(kind, experts):
    x, ends = torch.randn(ROWS, IN), torch.tensor([2, 2, 7])
    orders = torch.stack([torch.randperm(IN).int() for _ in range(EXPERTS)])
    packed, outlier_row, outlier, _, *numbers = spqr_arguments()
    for args in (packed, outlier_row[experts], outlier, None), (packed, outlier_row, outlier, orders[experts]):
        with pytest.raises(ValueError, match=rf"(outlier_row|perm) must be of 3 experts, got \[{len(experts)}, "):
            SPQR_OPS[kind](x, ends, *args, *numbers, False, False)
    packed, _, *numbers = affine_arguments()
    with pytest.raises(ValueError, match="perm must be of 3 experts"):
        AFFINE_OPS[kind](x, ends, packed, orders[experts], *numbers, False, False)
    with pytest.raises(ValueError, match="perm must be of 3 experts"):
        INTEGER_OPS[kind](x, ends, packed, orders[experts], *numbers, 8, False)


@pytest.mark.parametrize("kind", SPQR_OPS)
@pytest.mark.parametrize("change", [-1, 1])
def test_more_or_fewer_outliers_than_are_counted(kind, change):
    packed, outlier_row, outlier, *rest = spqr_arguments()
    other = torch.cat([outlier, outlier[:1]]) if change > 0 else outlier[:-1]
    message = f"outlier must hold the {len(outlier)} outliers that outlier_row counts, got {len(outlier) + change}"
    with pytest.raises(ValueError, match=message):
        SPQR_OPS[kind](torch.randn(ROWS, IN), torch.tensor([2, 2, 7]), packed, outlier_row, other, *rest, False, False)
