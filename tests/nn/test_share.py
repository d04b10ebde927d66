"""What the ranks hold of a packed layer, put together, computes what the whole layer computes."""

from __future__ import annotations

import pytest
import torch

from hf_spqr import ConfigError, UnsupportedLayerError
from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.formats.spqr import SpQRLayout
from hf_spqr.nn import AffineLinear, SpQRLinear
from hf_spqr.nn.share import ColumnShare, RowShare, chunk
from tests.weights import random_affine, random_spqr

LAYOUTS = [
    SpQRLayout(104, 1024),
    SpQRLayout(104, 1000, 4, 32, second_group=32),
    SpQRLayout(96, 104, 2, -1),
    AffineLayout(104, 1000, 4, 128),
    AffineLayout(104, 90, 8, -1),
    AffineLayout(104, 90, 3, 16, symmetric=True),
]


def whole(layout, perm=False, act_bits=None):
    bias = torch.randn(layout.out_features)
    if isinstance(layout, SpQRLayout):
        module = SpQRLinear.from_weight(random_spqr(layout, 0.02, perm), bias, torch.float32)
    else:
        module = AffineLinear.from_weight(random_affine(layout, perm), bias, torch.float32)
        module.act_bits = act_bits
    module.backend = "reference"  # float32 sums, so that differences are those of the division alone
    return module


def held(module, share):
    """The module of one rank, made as a load makes it."""
    specs = {name: (tuple(t.shape), t.dtype) for name, t in module.packed_tensors().items()}
    part = type(module).empty(share.whole, specs, dtype=torch.float32, backend="reference")
    part.act_bits = getattr(module, "act_bits", None)
    part.hold(share)
    for name, tensor in share.take(module.packed_tensors()).items():
        expected = part.get_parameter(name).shape
        assert tensor.shape == expected or name == "outlier"
        setattr(part, name, torch.nn.Parameter(tensor, requires_grad=False))
    share.finish(part)
    part.check()
    return part


@pytest.mark.parametrize("perm", [False, True], ids=["", "ordered"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows(layout, size, perm):
    module = whole(layout, perm)
    x = torch.randn(5, layout.in_features)
    outputs = []
    for rank in range(size):
        share = RowShare(layout, rank, size, None)
        part = held(module, share)
        part.bias = torch.nn.Parameter(module.bias[share.start : share.stop])
        assert (part.out_features, part.in_features) == (layout.out_features, layout.in_features)
        outputs.append(part(x))
    torch.testing.assert_close(torch.cat(outputs, -1), module(x), rtol=1e-5, atol=1e-6 * float(module(x).abs().max()))


@pytest.mark.parametrize("perm", [False, True], ids=["", "ordered"])
@pytest.mark.parametrize("act_bits", [None, 6], ids=["", "quantized"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_columns(layout, size, act_bits, perm, monkeypatch):
    if act_bits is not None and isinstance(layout, SpQRLayout):
        pytest.skip("SpQR leaves activations alone")
    module = whole(layout, perm, act_bits)
    x = torch.randn(5, layout.in_features)
    x[0, -1] = 20  # a value that only the last rank sees
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    monkeypatch.setattr(ColumnShare, "_gather", lambda self, part: x)
    monkeypatch.setattr(ColumnShare, "_extremes", lambda self, part: [low, high])
    outputs = []
    with torch.no_grad():
        for rank in range(size):
            share = ColumnShare(layout, rank, size, None, ordered=perm, act_bits=act_bits)
            outputs.append(held(module, share)(x[:, share.start : share.stop]))
        expected = module(x) - module.bias
    torch.testing.assert_close(sum(outputs), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_rank_holds_its_part_only():
    module = whole(SpQRLayout(4096, 4096))
    for kind in (RowShare, ColumnShare):
        bytes_of = [held(module, kind(module.layout, rank, 4, None)).nbytes() for rank in range(4)]
        assert 0.99 * module.nbytes() < sum(bytes_of) < 1.02 * module.nbytes()
        assert max(bytes_of) < 0.26 * module.nbytes()


def test_too_many_ranks():
    assert [chunk(10, rank, 3, "rows") for rank in range(3)] == [(0, 4), (4, 8), (8, 10)]
    with pytest.raises(ConfigError, match=r"5 experts cannot be divided among 4 ranks, .*: use fewer ranks"):
        chunk(5, 0, 4, "experts")
    with pytest.raises(
        ConfigError, match="2 groups of columns cannot be divided among 3 ranks"
    ):  # two groups of 64 for three ranks
        ColumnShare(AffineLayout(16, 96, 4, 64), 0, 3, None, ordered=True)


def test_no_wrong_gradient():
    module = whole(AffineLayout(32, 64, 8, -1), act_bits=8)
    share = ColumnShare(module.layout, 0, 2, None, act_bits=8)
    with pytest.raises(UnsupportedLayerError, match="No gradient"):
        held(module, share)(torch.randn(2, 32, requires_grad=True))


def test_extreme_columns_weigh_nothing():
    for layout in (AffineLayout(32, 96, 4, 64), AffineLayout(32, 96, 4, -1), AffineLayout(32, 96, 4, -1, True)):
        share = ColumnShare(layout, 0, 2, None, act_bits=8)
        tensors = share.take(affine.pack(random_affine(layout)))
        assert float(affine.unpack(share.layout, tensors).dequantize()[:, -2:].abs().max()) == 0


def test_outliers_go_to_their_rank():
    layout = SpQRLayout(64, 512)
    weight = random_spqr(layout, 0.05)
    tensors = spqr.pack(weight)
    for kind in (RowShare, ColumnShare):
        parts = [kind(layout, rank, 2, None).take(tensors) for rank in range(2)]
        assert sum(part["outlier"].numel() for part in parts) == weight.outlier_col.numel()
        assert all(part["outlier"].numel() > 0 for part in parts)


@pytest.mark.parametrize("perm", [False, True], ids=["", "ordered"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_put_together_again(layout, size, perm):
    tensors = whole(layout, perm).packed_tensors()
    shares = [RowShare(layout, 0, size, None), ColumnShare(layout, 0, size, None, ordered=perm)]
    if layout.per_channel and isinstance(layout, AffineLayout):
        shares.append(ColumnShare(layout, 0, size, None, ordered=perm, act_bits=8))
    for share in shares:
        again = share.rejoin([share.of(rank).take(tensors) for rank in range(size)])
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
