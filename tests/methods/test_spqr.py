"""SpQR for one layer: every shape, both modes, errors, and what it must be better than."""

import math

import pytest
import torch

from hf_spqr.errors import ConfigError, NonFiniteError, UnsupportedLayerError
from hf_spqr.formats import spqr as spqr_format
from hf_spqr.methods import rtn, spqr
from hf_spqr.methods.base import AffineParams, SpQRParams
from hf_spqr.methods.loop import propagate
from tests.methods.layers import output_error, random_layer

MODES = ["default", "reference"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bits": 2},
        {"bits": 4, "act_order": True},
        {"bits": 8, "scale_bits": 8, "zero_bits": 8},
        {"bits": 5, "scale_bits": 4, "zero_bits": 2},
        {"group_size": 8, "second_group": 32},
        {"group_size": 128, "second_group": 32, "act_order": True},
        {"group_size": -1},
        {"group_size": -1, "second_group": 32, "outlier_threshold": math.inf},
        {"outlier_threshold": math.inf},
        {"outlier_threshold": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(48, 96), (37, 150), (16, 16), (1, 33), (5, 7)], ids=str)
def test_any_shape_packs_and_reports_its_error(mode, fields, shape):
    params = SpQRParams(mode=mode, percdamp=0.05, **fields)
    weight, hessian = random_layer(*shape)
    result = spqr.quantize(weight, hessian, params)
    packed = spqr_format.unpack(result.weight.layout, spqr_format.pack(result.weight))
    restored = packed.dequantize()
    assert torch.equal(restored, result.weight.dequantize())
    assert result.error == pytest.approx(output_error(weight, restored, hessian), rel=2e-3, abs=1e-5)
    assert result.outliers == packed.outlier_col.numel()
    assert (packed.perm is None) != params.permutes
    assert packed.outlier_row.diff().sum() == result.outliers
    if math.isinf(params.outlier_threshold):
        assert result.outliers == 0
    for first, last in zip(packed.outlier_row[:-1].tolist(), packed.outlier_row[1:].tolist(), strict=True):
        columns = packed.outlier_col[first:last]
        assert (columns.diff() > 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_better_than_round_to_nearest(mode, bits, seed):
    weight, hessian = random_layer(64, 128, seed)
    # Groups of 32 with 16-bit scales take as much room as groups of 16 with quantized statistics.
    plain = rtn.quantize(weight, AffineParams(bits=bits, group_size=32), hessian).error
    for tau in (math.inf, 0.2):
        params = SpQRParams(bits=bits, mode=mode, outlier_threshold=tau, percdamp=0.03)
        assert spqr.quantize(weight, hessian, params).error < plain


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_default_is_better_than_the_reference_at_no_more_outliers(seed, bits):
    weight, hessian = random_layer(96, 160, seed)
    reference = spqr.quantize(weight, hessian, SpQRParams(bits=bits, mode="reference"))
    low, high = 0.02, 5.0
    for _ in range(8):
        middle = math.sqrt(low * high)
        result = spqr.quantize(weight, hessian, SpQRParams(bits=bits, outlier_threshold=middle))
        low, high = (middle, high) if result.outliers > reference.outliers else (low, middle)
    result = spqr.quantize(weight, hessian, SpQRParams(bits=bits, outlier_threshold=high))
    assert result.outliers <= reference.outliers
    assert result.error < 0.9 * reference.error


def test_the_default_ends_with_coordinate_descent(monkeypatch):
    weight, hessian = random_layer(96, 160)
    error = spqr.quantize(weight, hessian, SpQRParams()).error
    monkeypatch.setattr(spqr, "descend", lambda *arguments: None)
    assert error < 0.99 * spqr.quantize(weight, hessian, SpQRParams()).error


@pytest.mark.parametrize(
    ("mode", "act_order", "first"),
    [("default", False, 40), ("default", True, 0), ("reference", False, 0), ("reference", True, 0)],
)
def test_which_stored_column_is_quantized_first(mode, act_order, first, monkeypatch):
    """That of most energy: where columns are stored in another order it is the first, else the reference waits."""
    weight, hessian = random_layer(16, 64)
    hessian[40] *= 30
    hessian[:, 40] *= 30
    plans = []

    def spy(work, upper, plan, *rest):
        plans.append(plan)
        return propagate(work, upper, plan, *rest)

    monkeypatch.setattr(spqr, "propagate", spy)
    result = spqr.quantize(weight, hessian, SpQRParams(mode=mode, act_order=act_order))
    assert plans[0].columns[0] == first
    assert (result.weight.perm is not None) == act_order and (not act_order or result.weight.perm[0] == 40)


@pytest.mark.parametrize("mode", MODES)
def test_smaller_threshold_more_outliers_less_error(mode):
    weight, hessian = random_layer(64, 128)
    results = [spqr.quantize(weight, hessian, SpQRParams(mode=mode, outlier_threshold=t)) for t in (2, 0.5, 0.1, 0.02)]
    assert [r.outliers for r in results] == sorted(r.outliers for r in results)
    assert [r.error for r in results] == sorted((r.error for r in results), reverse=True)


def test_reference_outliers_are_what_the_engine_keeps():
    """Value + dense at an outlier is the updated weight, which in the first column is the weight itself."""
    weight, hessian = random_layer(64, 64)
    params = SpQRParams(mode="reference", outlier_threshold=0.02, act_order=True)
    result = spqr.quantize(weight, hessian, params).weight
    first = int(result.perm[0])
    rows = torch.repeat_interleave(torch.arange(64), result.outlier_row.diff())[result.outlier_col == 0]
    assert rows.numel() > 0
    torch.testing.assert_close(result.dequantize()[rows, first], weight[rows, first], rtol=1e-3, atol=1e-6)


def test_defaults_of_the_modes():
    assert (SpQRParams().permutes, SpQRParams().damping) == (False, 0.03)
    reference = SpQRParams(mode="reference")
    assert (reference.permutes, reference.damping) == (True, 1.0)
    assert SpQRParams(mode="reference", act_order=False, percdamp=0.01).permutes is False


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(mode, dtype):
    weight, hessian = random_layer(32, 64)
    result = spqr.quantize(weight.to(dtype), hessian.to(torch.float64), SpQRParams(mode=mode))
    assert result.error < 0.2


@pytest.mark.parametrize("mode", MODES)
def test_dead_columns(mode):
    weight, hessian = random_layer(32, 96)
    hessian[10:14] = 0
    hessian[:, 10:14] = 0
    result = spqr.quantize(weight, hessian, SpQRParams(mode=mode, percdamp=0.01))
    assert result.error < 0.2 and torch.isfinite(result.weight.dequantize()).all()


def test_dead_columns_keep_their_weights_by_default():
    weight, hessian = random_layer(32, 96)
    hessian[10:14] = 0
    hessian[:, 10:14] = 0
    restored = spqr.quantize(weight, hessian, SpQRParams(bits=4)).weight.dequantize()
    off = (restored - weight)[:, 10:14].norm() / weight[:, 10:14].norm()
    assert off < 0.5


@pytest.mark.parametrize("mode", MODES)
def test_all_zero_weight(mode):
    _, hessian = random_layer(16, 32)
    result = spqr.quantize(torch.zeros(16, 32), hessian, SpQRParams(mode=mode))
    assert math.isfinite(result.error) or mode == "reference"
    if mode == "default":
        assert result.error < 1e-6 and result.weight.dequantize().abs().max() < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_few_tokens(mode):
    weight, hessian = random_layer(32, 128, tokens=5)
    result = spqr.quantize(weight, hessian, SpQRParams(mode=mode, percdamp=0.01))
    assert result.error < 0.2


def test_damping_ladder_is_reported():
    weight, hessian = random_layer(32, 64, tokens=5)
    hessian -= 1e-3 * hessian.diagonal().mean() * torch.eye(64)
    result = spqr.quantize(weight, hessian, SpQRParams(percdamp=1e-7))
    assert result.damping_raised and result.percdamp > 1e-4
    assert torch.isfinite(result.weight.dequantize()).all()


def test_scale_of_the_hessian_does_not_matter():
    weight, hessian = random_layer(32, 64)
    a, b = (spqr.quantize(weight, hessian * f, SpQRParams()) for f in (1.0, 1024.0))
    assert torch.equal(a.weight.codes, b.weight.codes) and a.error == pytest.approx(b.error, rel=1e-5)


def test_deterministic_and_inputs_untouched():
    weight, hessian = random_layer(32, 64)
    kept = weight.clone(), hessian.clone()
    a, b = (spqr.quantize(weight, hessian, SpQRParams()) for _ in range(2))
    assert torch.equal(a.weight.dequantize(), b.weight.dequantize())
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])


def test_weights_beyond_float16_are_refused():
    weight, hessian = random_layer(32, 64)
    weight[3, 5] = 6e4
    restored = spqr.quantize(weight, hessian, SpQRParams()).weight.dequantize()
    assert restored[3, 5] == pytest.approx(6e4, rel=1e-2)
    weight[3, 5] = 2e5
    with pytest.raises(UnsupportedLayerError, match="larger than float16"):
        spqr.quantize(weight, hessian, SpQRParams())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite(value):
    weight, hessian = random_layer(16, 32)
    bad = weight.clone()
    bad[3, 4] = value
    with pytest.raises(NonFiniteError, match=r"weight has 1 NaN or infinite .*\[3, 4\]"):
        spqr.quantize(bad, hessian, SpQRParams())
    bad = hessian.clone()
    bad[1, 2] = value
    with pytest.raises(NonFiniteError, match="Hessian has 1"):
        spqr.quantize(weight, bad, SpQRParams())


@pytest.mark.parametrize("hessian", [torch.eye(8), torch.ones(32, 16)])
def test_wrong_shapes(hessian):
    with pytest.raises(ConfigError, match=r"hessian must be \[32, 32\]"):
        spqr.quantize(torch.randn(16, 32), hessian, SpQRParams())
    with pytest.raises(ConfigError, match="non-empty"):
        spqr.quantize(torch.randn(16), torch.eye(16), SpQRParams())


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1},
        {"bits": 9},
        {"group_size": 7},
        {"group_size": 0},
        {"scale_bits": 1},
        {"zero_bits": 9},
        {"second_group": 64},
        {"outlier_threshold": 0},
        {"outlier_threshold": math.nan},
        {"percdamp": -1.0},
        {"percdamp": math.inf},
        {"mode": "fast"},
    ],
    ids=str,
)
def test_bad_parameters(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        SpQRParams(**fields)
