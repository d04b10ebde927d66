"""Parts of packed matrices: rows, columns, joined. Every part decodes to the same numbers as in the whole."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.parts import join_columns, join_rows, joinable, take_columns, take_rows
from hf_spqr.formats.spqr import SpQRLayout
from tests.weights import random_affine, random_spqr

LAYOUTS = [
    SpQRLayout(72, 640, 3, 16),
    SpQRLayout(72, 640, 4, 16, 4, second_group=32),
    SpQRLayout(72, 640, 2, -1),
    SpQRLayout(72, 80000, 3, 128),
    AffineLayout(72, 640, 4, 16),
    AffineLayout(72, 640, 3, 8, symmetric=True),
    AffineLayout(72, 640, 5, -1),
    AffineLayout(72, 640, 2, 16, scale_dtype=torch.bfloat16),
]


def whole(layout, perm=False, seed=0):
    if isinstance(layout, SpQRLayout):
        return layout, spqr.pack(random_spqr(layout, 0.02, perm, seed))
    return layout, affine.pack(random_affine(layout, perm, seed))


def decode(matrix) -> torch.Tensor:
    layout, tensors = matrix
    kind = spqr if isinstance(layout, SpQRLayout) else affine
    assert set(tensors) >= set(kind.TENSORS)
    if kind is spqr:
        spqr.check_outliers(layout, tensors["outlier_row"], tensors["outlier"])
    return kind.unpack(layout, tensors).dequantize()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("rows", [(0, 16), (16, 64), (48, 72), (0, 72)])
def test_rows(layout, rows):
    matrix = whole(layout, perm=True)
    assert torch.equal(decode(take_rows(*matrix, *rows)), decode(matrix)[slice(*rows)])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("columns", [(0, 256), (256, 512), (512, 640), (0, 384), (128, 640), (64, 192), (0, 640)])
def test_columns(layout, columns):
    if layout.in_features > 640:
        columns = tuple(128 * column for column in columns)
        columns = (columns[0], min(columns[1], layout.in_features))
    matrix = whole(layout)
    assert torch.equal(decode(take_columns(*matrix, *columns)), decode(matrix)[:, slice(*columns)])


def test_whole_panels_keep_their_words():
    layout, tensors = whole(SpQRLayout(32, 768, 3, 16))
    _, part = take_columns(layout, tensors, 256, 512)
    assert torch.equal(part["packed"], tensors["packed"][:, 29 * 16 : 2 * 29 * 16])


def test_wide_matrix_gets_narrow_outliers():
    """A part of fewer than 65536 columns stores outliers in 32 bits."""
    layout, tensors = whole(SpQRLayout(16, 80000, 3, 128))
    assert tensors["outlier"].dtype == torch.int64
    for columns in ((0, 2048 * 4), (0, 128 * 5)):
        assert take_columns(layout, tensors, *columns)[1]["outlier"].dtype == torch.int32


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_join(layout):
    parts = [whole(replace(layout, out_features=rows), seed=rows) for rows in (32, 16, 24)]
    joined = join_rows(parts)
    assert joined[0].out_features == 72
    assert torch.equal(decode(joined), torch.cat([decode(part) for part in parts]))


def test_take_and_join_are_inverse():
    matrix = whole(SpQRLayout(72, 640), perm=True)
    _, tensors = join_rows([take_rows(*matrix, 0, 32), take_rows(*matrix, 32, 72)])
    assert all(torch.equal(tensors[name], tensor) for name, tensor in matrix[1].items())


def test_what_cannot_be_joined():
    matrix = whole(SpQRLayout(32, 640))
    others = [
        whole(SpQRLayout(32, 640, bits=4)),
        whole(SpQRLayout(32, 320)),
        whole(SpQRLayout(32, 640), perm=True),
        whole(AffineLayout(32, 640, 3, 16)),
    ]
    assert not any(joinable(matrix, other) for other in others)
    assert not joinable(whole(SpQRLayout(24, 640)), matrix)
    assert not joinable(whole(SpQRLayout(32, 640), perm=True, seed=1), others[2])
    assert joinable(matrix, whole(SpQRLayout(24, 640)))
    with pytest.raises(ValueError, match="cannot be joined"):
        join_rows([matrix, others[0]])


def test_bad_cuts():
    matrix = whole(SpQRLayout(72, 640, second_group=32))
    for rows in ((8, 32), (0, 40), (16, 16), (0, 80), (-16, 16)):
        with pytest.raises(ValueError, match="multiples of 16"):
            take_rows(*matrix, *rows)
    for columns in ((16, 64), (0, 48), (32, 32), (0, 672)):
        with pytest.raises(ValueError, match="multiples of 32"):
            take_columns(*matrix, *columns)
    with pytest.raises(ValueError, match="act_order"):
        take_columns(*whole(SpQRLayout(72, 640), perm=True), 0, 256)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("cuts", [(256,), (128, 384)], ids=str)
def test_columns_joined_again(layout, cuts):
    unit = 128 if layout.in_features > 640 else 1
    matrix = whole(layout)
    edges = [0, *(unit * cut for cut in cuts), layout.in_features]
    parts = [take_columns(*matrix, start, stop) for start, stop in pairwise(edges)]
    joined, tensors = join_columns(parts)
    assert joined == layout and all(torch.equal(tensors[name], tensor) for name, tensor in matrix[1].items())


def test_columns_that_cannot_be_joined():
    matrix = whole(SpQRLayout(32, 640, second_group=32))
    for other in (whole(SpQRLayout(32, 640, bits=4)), whole(SpQRLayout(48, 640, second_group=32))):
        with pytest.raises(ValueError, match="cannot be joined"):
            join_columns([matrix, other])
    with pytest.raises(ValueError, match="cannot be joined"):  # the first ends inside a group
        join_columns([whole(SpQRLayout(32, 72)), whole(SpQRLayout(32, 640))])
