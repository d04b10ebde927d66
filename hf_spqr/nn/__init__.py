"""Modules that hold packed weights and stand in for ``nn.Linear``. They know formats and ops, no algorithm."""

from hf_spqr.nn.affine import AffineLinear
from hf_spqr.nn.experts import PackedExperts
from hf_spqr.nn.grouped import AffineGroupedLinear, GroupedLinear, SpQRGroupedLinear
from hf_spqr.nn.packed import PackedLinear
from hf_spqr.nn.spqr import SpQRLinear
from hf_spqr.ops.schema import FLOATS

__all__ = [
    "FLOATS",
    "AffineGroupedLinear",
    "AffineLinear",
    "GroupedLinear",
    "PackedExperts",
    "PackedLinear",
    "SpQRGroupedLinear",
    "SpQRLinear",
]
