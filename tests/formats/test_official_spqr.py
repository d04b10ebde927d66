"""The official SpQR layout, both ways, against a decoder written from its description and against a real file."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_spqr.formats import official_spqr
from hf_spqr.formats.spqr import SpQRLayout
from tests.weights import random_spqr


def by_hand(tensors, rows, columns):
    """[N, K] float64 in original column order, one word at a time, outliers added."""
    out = torch.zeros(rows, columns, dtype=torch.float64)
    words = tensors["dense_weights"].tolist()
    for tile in range(rows * columns // 256):
        tile_row, tile_column = divmod(tile, columns // 16)
        here = words[16 * tile : 16 * tile + 16]
        raw = bytes((word >> 54) & 0xFF for word in here[::2])
        ss, zs, sz, zz = torch.frombuffer(bytearray(raw), dtype=torch.float16).double().tolist()
        for r, word in enumerate(here):
            assert word >> 62 == 0 and (word >> 54) & 0xFF == raw[r // 2]
            scale, zero = ss * ((word & 7) - sz), zs * (((word >> 3) & 7) - zz)
            for c in range(16):
                out[16 * tile_row + r, 16 * tile_column + c] = scale * (((word >> (6 + 3 * c)) & 7) - zero)
    starts, values = tensors["row_offsets"].tolist(), tensors["col_vals"]
    value = (values >> 16).to(torch.int16).view(torch.float16).tolist()
    striped = len(starts) == rows // 16 + 1
    for owner in range(len(starts) - 1):
        for at in range(starts[owner], starts[owner + 1]):
            row = 16 * owner + (at - starts[owner]) % 16 if striped else owner
            out[row, int(values[at]) & 0xFFFF] += value[at]
    perm = tensors["in_perm"].view(torch.int16).long() & 0xFFFF
    back = torch.empty_like(out)
    back[:, perm] = out
    return back


def tamed(weight):
    """Statistics that give weights of about one, so that fp16 outliers hold what they should."""
    second = torch.tensor([0.1, -1.0, 0.9, -0.5]).half() * (0.9 + 0.2 * torch.rand(*weight.second.shape)).half()
    return dataclasses.replace(weight, second=second)


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 12)), bits=st.sampled_from([2, 3]),
    group_size=st.sampled_from([-1, 16, 32, 64]), second_group=st.sampled_from([16, 32]),
    share=st.sampled_from([0.0, 0.01, 0.2]), perm=st.booleans(), kind=st.sampled_from(["csr", "ptcsr"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_round_trip_and_independent_decoder(size, bits, group_size, second_group, share, perm, kind, seed):
    rows, columns = 16 * size[0], 16 * size[1]
    layout = SpQRLayout(rows, columns, bits, group_size, 3, second_group)
    weight = tamed(random_spqr(layout, share, perm, seed))
    tensors = official_spqr.encode(weight, kind)
    back = official_spqr.decode(rows, columns, tensors)
    torch.testing.assert_close(back.dequantize(), weight.dequantize(), rtol=0, atol=2e-3)
    torch.testing.assert_close(by_hand(tensors, rows, columns).float(), back.dequantize(), rtol=1e-5, atol=1e-5)
    again = official_spqr.encode(back, kind)
    assert all(torch.equal(again[name], tensors[name]) for name in official_spqr.TENSORS)


def test_codes_and_statistics_are_kept_bit_for_bit():
    weight = official_spqr.nearest_codes(tamed(random_spqr(SpQRLayout(32, 64), 0.05, True)))
    back = official_spqr.decode(32, 64, official_spqr.encode(weight))
    for field in (
        "codes",
        "scale_codes",
        "zero_codes",
        "second",
        "outlier_row",
        "outlier_col",
        "outlier_value",
        "perm",
    ):
        assert torch.equal(getattr(back, field), getattr(weight, field)), field


def raw_copy(weight):
    """What the published converter writes: the code of zero under an outlier, and the whole weight as its value."""
    row = torch.repeat_interleave(weight.outlier_row.diff().long())
    column = weight.outlier_col.long()
    dense = weight.dense()[row, column] + weight.outlier_value.float()
    second = weight.second.float().repeat_interleave(16, 0)[row, column // 16]
    zero = second[:, 2] * (weight.zero_codes[row, column // 16].float() - second[:, 3])
    codes = weight.codes.clone()
    codes[row, column] = zero.round().clamp(0, 7).to(torch.uint8)
    return dataclasses.replace(weight, codes=codes, outlier_value=dense.half())


def test_raw_outliers_are_told_from_residuals_and_repaired():
    torch.manual_seed(0)
    weight = official_spqr.nearest_codes(tamed(random_spqr(SpQRLayout(64, 256), 0.02)))
    raw = raw_copy(weight)
    hits, total = official_spqr.raw_outliers(raw)
    assert hits == total > 200
    assert official_spqr.raw_outliers(weight)[0] < total / 2
    assert (raw.dequantize() - weight.dequantize()).abs().max() > 0.05
    repaired = official_spqr.repair(raw)
    torch.testing.assert_close(repaired.dequantize(), weight.dequantize(), rtol=2**-10, atol=2e-3)
    written = official_spqr.decode(64, 256, official_spqr.encode(repaired))
    assert official_spqr.raw_outliers(written)[0] < total / 2  # what we write is never repaired a second time


def test_a_layer_without_outliers_may_have_float_values():
    tensors = official_spqr.encode(random_spqr(SpQRLayout(16, 32), 0.0))
    tensors["col_vals"] = torch.empty(0)
    assert official_spqr.decode(16, 32, tensors).outlier_col.numel() == 0


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (SpQRLayout(32, 64, bits=4), "at most 3 bits"),
        (SpQRLayout(32, 64, group_size=8), "groups of 16"),
        (SpQRLayout(32, 64, stat_bits=4), "stat_bits=4"),
        (SpQRLayout(40, 64), "multiples of 16"),
        (SpQRLayout(16, 32784), "at most 32768 columns"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        official_spqr.encode(random_spqr(layout, 0.0))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dense_weights", lambda t: t[:-1], "dense_weights should have"),
        ("dense_weights", lambda t: t.int(), "int64"),
        ("row_offsets", lambda t: t[:-1], "row_offsets should have"),
        ("row_offsets", lambda t: t + 1, "should rise"),
        ("row_offsets", lambda t: t.flip(0), "should rise"),
        ("col_vals", lambda t: t | 0xFFFF, "lies in column"),
        ("col_vals", lambda t: t & ~0xFFFF, "two outliers lie in one place"),
        ("col_vals", lambda t: (t & 0xFFFF) | -65536, "not finite"),
        ("in_perm", lambda t: t * 0, "in_perm does not hold"),
    ],
)
def test_damaged_tensors_are_refused(name, change, message):
    tensors = official_spqr.encode(tamed(random_spqr(SpQRLayout(32, 64), 0.1, True)))
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=message):
        official_spqr.decode(32, 64, tensors)


def test_stripes_that_begin_in_the_middle_of_their_rows_are_refused():
    tensors = official_spqr.encode(tamed(random_spqr(SpQRLayout(32, 64), 0.1)), "ptcsr")
    tensors["row_offsets"][1] += 1
    with pytest.raises(ValueError, match="should be multiples of 16"):
        official_spqr.decode(32, 64, tensors)


@pytest.mark.shared
def test_the_fixture_matches_its_reference_after_repair(shared_dir):
    folder = shared_dir / "fixtures" / "official_spqr"
    stored = load_file(folder / "tiny_hub" / "model.safetensors")
    reference = load_file(folder / "tiny_ref" / "model.safetensors")
    assert json.loads((folder / "tiny_hub" / "config.json").read_text())["quantization_config"]["bits"] == 3
    hits = total = 0
    for name in [key[: -len(".dense_weights")] for key in stored if key.endswith(".dense_weights")]:
        expected = reference[f"{name}.weight"].float()
        weight = official_spqr.decode(*expected.shape, {k: stored[f"{name}.{k}"] for k in official_spqr.TENSORS})
        found = official_spqr.raw_outliers(weight)
        hits, total = hits + found[0], total + found[1]
        got = official_spqr.repair(weight).dequantize()
        assert (got - expected).abs().max() <= 2**-10 * expected.abs().max()  # fp16 statistics and values
        assert (weight.dequantize() - expected).abs().max() > 0.004
    assert hits / total > 0.99
