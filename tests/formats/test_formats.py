"""Exact round trips of every packed format, and the sizes that docs/format.md promises."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_spqr.formats import affine, columns, spqr, tiles
from hf_spqr.formats.panels import GROUP_SIZES
from tests.weights import random_affine, random_spqr

SIZES = st.tuples(st.integers(1, 70), st.integers(1, 600))


def assert_same(a, b) -> None:
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
        assert same, field.name


@pytest.mark.parametrize("bits", tiles.BITS)
def test_every_bit_of_a_tile_holds_one_bit_of_a_code(bits):
    places = {(f.vector, f.shift + i) for f in tiles.tile_fields(bits) for i in range(f.width)}
    assert places == {(v, i) for v in range(bits) for i in range(16)}
    stored = sorted((f.pair, f.low + i) for f in tiles.tile_fields(bits) for i in range(f.width))
    assert stored == [(pair, i) for pair in range(16) for i in range(bits)]


@pytest.mark.parametrize("bits", tiles.BITS)
def test_tiles_round_trip(bits):
    codes = torch.randint(0, 1 << bits, (48, 96), dtype=torch.uint8)
    words = tiles.pack_tiles(codes, bits)
    assert words.shape == (3, 3, bits, 16)
    assert torch.equal(tiles.unpack_tiles(words, bits), codes)


def test_three_bit_tile_as_the_specification_draws_it():
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[5, 2 * 6 + 1] = 0b101  # pair 6, odd column: fifth place of half-word 0
    codes[5, 2 * 15] = 0b110  # pair 15, even column: bit 15 of half-words 1 and 2
    words = tiles.pack_tiles(codes, 3)[0, 0]
    expected = torch.zeros(3, 16, dtype=torch.int32)
    expected[0, 5] = 0b101 << (16 + 12)
    expected[1, 5] = expected[2, 5] = 1 << 15
    assert torch.equal(words, expected)


@settings(max_examples=60, deadline=None)
@given(
    size=SIZES, bits=st.sampled_from(spqr.BITS), group_size=st.sampled_from(GROUP_SIZES),
    stat_bits=st.sampled_from(spqr.STAT_BITS), second_group=st.sampled_from(spqr.SECOND_GROUPS),
    share=st.sampled_from([0.0, 0.01, 0.3]), perm=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_spqr_round_trip(size, bits, group_size, stat_bits, second_group, share, perm, seed):
    layout = spqr.SpQRLayout(*size, bits, group_size, stat_bits, second_group)
    weight = random_spqr(layout, share, perm, seed)
    tensors = spqr.pack(weight)
    assert tensors["packed"].shape == layout.packed_shape()
    spqr.check_outliers(layout, tensors["outlier_row"], tensors["outlier"])
    assert_same(spqr.unpack(layout, tensors), weight)


def test_outliers_of_another_width_are_refused():
    """Read as the width that they have, they would be other columns."""
    layout = spqr.SpQRLayout(16, 64)
    tensors = spqr.pack(random_spqr(layout))
    with pytest.raises(ValueError, match=r"outlier must be torch.int32, got torch.int64"):
        spqr.unpack(layout, {**tensors, "outlier": tensors["outlier"].long()})


@settings(max_examples=60, deadline=None)
@given(
    size=SIZES, bits=st.sampled_from(affine.BITS), group_size=st.sampled_from(GROUP_SIZES), symmetric=st.booleans(),
    scale_dtype=st.sampled_from(affine.SCALE_DTYPES), perm=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_affine_round_trip(size, bits, group_size, symmetric, scale_dtype, perm, seed):
    layout = affine.AffineLayout(*size, bits, group_size, symmetric, scale_dtype)
    weight = random_affine(layout, perm, seed)
    tensors = affine.pack(weight)
    assert tensors["packed"].shape == layout.packed_shape()
    assert_same(affine.unpack(layout, tensors), weight)


def test_packing_by_stretches_of_rows_changes_nothing(monkeypatch):
    weight = random_spqr(spqr.SpQRLayout(200, 300))
    whole = spqr.pack(weight)
    monkeypatch.setattr("hf_spqr.formats.panels._row_stretches", lambda blocks, _: ((i, i + 1) for i in range(blocks)))
    assert torch.equal(spqr.pack(weight)["packed"], whole["packed"])
    assert_same(spqr.unpack(weight.layout, whole), weight)


@pytest.mark.parametrize(
    ("layout", "bits_per_weight"),
    [
        (spqr.SpQRLayout(4096, 4096), 3.625),
        (spqr.SpQRLayout(4096, 4096, bits=4), 4.625),
        (spqr.SpQRLayout(4096, 4096, bits=2), 2.625),
        (spqr.SpQRLayout(4096, 4096, second_group=32), 3.5),
        (spqr.SpQRLayout(8192, 2048, group_size=32), 3.3125),
        (affine.AffineLayout(4096, 4096, 4, 128), 4 + 20 / 128),
        (affine.AffineLayout(4096, 4096, 4, 128, symmetric=True), 4 + 16 / 128),
        (affine.AffineLayout(4096, 4096, 3), 3 + 32 / 4096),
    ],
)
def test_bits_per_weight(layout, bits_per_weight):
    assert 32 * layout.words * layout.row_blocks / (layout.out_features * layout.in_features) == bits_per_weight


@pytest.mark.parametrize(
    ("layout", "vectors"),
    [
        (spqr.SpQRLayout(16, 128), 2 + 1 + 4 * 3),  # 8 groups: two vectors of 3-bit codes, one of second level
        (spqr.SpQRLayout(16, 64), 1 + 1 + 2 * 3),
        (spqr.SpQRLayout(16, 176), 3 + 2 + 6 * 3),  # 11 groups: the code of pair 10 is in the third vector
        (spqr.SpQRLayout(16, 384), 29 + 2 + 1 + 4 * 3),
        (spqr.SpQRLayout(16, 128, stat_bits=4), 2 + 1 + 4 * 3),
        (spqr.SpQRLayout(16, 128, stat_bits=2), 1 + 1 + 4 * 3),
        (spqr.SpQRLayout(16, 128, stat_bits=6), 6 + 1 + 4 * 3),
        (spqr.SpQRLayout(16, 4096, group_size=-1), 1 + 1 + 128 * 3),
    ],
)
def test_a_short_panel_stores_only_the_vectors_that_hold_a_code(layout, vectors):
    assert layout.words == 16 * vectors


def test_an_outlier_costs_32_bits_and_a_row_counter_32():
    weight = random_spqr(spqr.SpQRLayout(64, 256), share=0.02)
    dense = random_spqr(spqr.SpQRLayout(64, 256), share=0.0)
    more = columns.nbytes(spqr.pack(weight)) - columns.nbytes(spqr.pack(dense))
    assert more == 4 * weight.outlier_col.numel()
    assert columns.nbytes(spqr.pack(dense)) == 64 * 256 * 3.625 / 8 + 4 * 65


def test_dequantize_follows_the_formula():
    layout = spqr.SpQRLayout(20, 40, bits=4, group_size=8, second_group=32)
    weight = random_spqr(layout, share=0.1, perm=True)
    got = weight.dequantize()
    start = weight.outlier_row
    outliers = {}
    for i in range(20):
        for e in range(int(start[i]), int(start[i + 1])):
            outliers[i, int(weight.outlier_col[e])] = float(weight.outlier_value[e])
    for i in range(20):
        for j in range(40):
            ss, sz, zs, zz = weight.second[i // 16, j // 16].double().tolist()
            scale = ss * (int(weight.scale_codes[i, j // 8]) - sz)
            zero = zs * (int(weight.zero_codes[i, j // 8]) - zz)
            expected = scale * (int(weight.codes[i, j]) - zero) + outliers.get((i, j), 0.0)
            assert float(got[i, int(weight.perm[j])]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_wide_matrices_keep_their_columns():
    column = torch.tensor([0, 65535, 65536, 200_000], dtype=torch.int32)
    value = torch.tensor([1.5, -2.0, 0.25, -65504.0], dtype=torch.float16)
    joined = spqr.join_outliers(column, value, spqr.SpQRLayout(1, 200_001).outlier_dtype)
    assert joined.dtype == torch.int64
    back = spqr.split_outliers(joined)
    assert torch.equal(back[0], column) and torch.equal(back[1], value)


def test_bad_tensors_are_refused():
    layout = spqr.SpQRLayout(32, 64)
    weight = random_spqr(layout)
    tensors = spqr.pack(weight)
    with pytest.raises(ValueError, match="packed must be"):
        spqr.unpack(spqr.SpQRLayout(32, 96), tensors)
    with pytest.raises(ValueError, match="do not fit 3 bits"):
        spqr.pack(dataclasses.replace(weight, codes=weight.codes + 8))
    with pytest.raises(ValueError, match="codes must be"):
        dataclasses.replace(weight, codes=weight.codes[:, 1:])
    falling = tensors["outlier_row"].clone()
    falling[1] = tensors["outlier"].numel() + 1
    with pytest.raises(ValueError, match="outlier_row"):
        spqr.check_outliers(layout, falling, tensors["outlier"])
    with pytest.raises(ValueError, match=r"outlier_row must be torch.int32 \[33\], got torch.int64 \[33\]"):
        spqr.check_outliers(layout, tensors["outlier_row"].long(), tensors["outlier"])
    with pytest.raises(ValueError, match=r"outlier must be torch.int32, got torch.int64"):
        spqr.check_outliers(layout, tensors["outlier_row"], tensors["outlier"].long())
    twice = tensors["outlier"].clone()
    row = int((tensors["outlier_row"].diff() > 1).nonzero()[0])
    twice[tensors["outlier_row"][row] + 1] = twice[tensors["outlier_row"][row]]
    with pytest.raises(ValueError, match="rise within each row"):
        spqr.check_outliers(layout, tensors["outlier_row"], twice)
    with pytest.raises(ValueError, match="beyond the last column"):
        spqr.check_outliers(spqr.SpQRLayout(32, 10), tensors["outlier_row"], tensors["outlier"])
    infinite = tensors["outlier"] & 0xFFFF | 0x7C00 << 16
    with pytest.raises(ValueError, match="an outlier is infinite or NaN"):
        spqr.check_outliers(layout, tensors["outlier_row"], infinite)
    with pytest.raises(ValueError, match="perm"):
        columns.check_perm(torch.zeros(64, dtype=torch.int32), 64)
    with pytest.raises(ValueError, match=r"perm must be torch.int32, got torch.int64"):
        columns.check_perm(torch.arange(64), 64)


@pytest.mark.parametrize("symmetric", [True, False])
def test_bad_affine_tensors_are_refused(symmetric):
    layout = affine.AffineLayout(32, 64, bits=4, group_size=16, symmetric=symmetric)
    weight = random_affine(layout)
    for name, change in (("codes", weight.codes + 16), ("zeros", weight.zeros)):
        if change is None:
            continue
        with pytest.raises(ValueError, match=f"{name} hold values that do not fit 4 bits"):
            affine.pack(dataclasses.replace(weight, **{name: change | 16}))
    with pytest.raises(ValueError, match="zeros must be None for a symmetric layout"):
        dataclasses.replace(weight, zeros=weight.codes[:, :4] if symmetric else None)
    with pytest.raises(ValueError, match=r"scales must be torch.float16 \[32, 4\], got torch.float32"):
        dataclasses.replace(weight, scales=weight.scales.float())
    tensors = affine.pack(weight)
    with pytest.raises(ValueError, match="packed must be int32"):
        affine.unpack(dataclasses.replace(layout, in_features=96), tensors)
    with pytest.raises(ValueError, match=r"packed must be int32 .* got torch.int64"):
        affine.unpack(layout, {"packed": tensors["packed"].long()})


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("group", [-1, 8, 128])
def test_statistics_that_are_not_finite_are_refused(group, value):
    """Wherever they lie; the largest and smallest finite ones pass."""
    for place in ((0, 0, 0), (2, -1, 3)):
        layout = spqr.SpQRLayout(40, 300, group_size=group)
        weight = random_spqr(layout)
        second = weight.second.fill_(-65504).clone()
        spqr.check_statistics(layout, spqr.pack(weight)["packed"])
        second[place] = value
        with pytest.raises(ValueError, match="second-level scale or zero point is infinite or NaN"):
            spqr.check_statistics(layout, spqr.pack(dataclasses.replace(weight, second=second))["packed"])
    for dtype, symmetric in ((torch.float16, False), (torch.bfloat16, True)):
        layout = affine.AffineLayout(40, 300, 4, group, symmetric, dtype)
        weight = random_affine(layout)
        weight.scales[0] = torch.finfo(dtype).max
        weight.scales[1] = torch.finfo(dtype).tiny / 4
        affine.check_statistics(layout, affine.pack(weight)["packed"])
        for place in ((0, 0), (39, -1)):
            scales = weight.scales.clone()
            scales[place] = value
            packed = affine.pack(dataclasses.replace(weight, scales=scales))["packed"]
            with pytest.raises(ValueError, match="a scale is infinite or NaN"):
                affine.check_statistics(layout, packed)
            with pytest.raises(ValueError, match="a scale is infinite or NaN"):
                affine.check_statistics(layout, torch.stack([torch.zeros_like(packed), packed]))  # of experts


@pytest.mark.parametrize("bad", [{"bits": 9}, {"group_size": 17}, {"stat_bits": 1}, {"second_group": 48}])
def test_bad_layouts_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        spqr.SpQRLayout(16, 32, **bad)
