"""Random packed layers: sound, of the shape and kind asked for, and with as many outliers."""

from __future__ import annotations

import pytest
import torch

from hf_spqr.bench import weights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_spqr_layers_are_sound_and_their_output_is_as_large_as_the_input(bits: int) -> None:
    torch.manual_seed(0)
    layer = weights.spqr_linear(200, 512, bits=bits, outliers=0.01)
    layer.check()
    assert (layer.out_features, layer.in_features, layer.layout.bits) == (200, 512, bits)
    assert 0.5 < layer.outliers() / (0.01 * 200 * 512) < 1.5
    assert layer.outlier_row.diff().unique().numel() > 3  # rows differ
    assert 0.2 < layer.dequantize_weight(torch.float32).std() * 512**0.5 < 5


def test_no_outliers() -> None:
    assert weights.spqr_linear(32, 64, outliers=0).outliers() == 0


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (3, 32), (8, -1)])
def test_affine_layers(bits: int, group_size: int) -> None:
    torch.manual_seed(0)
    layer = weights.affine_linear(200, 512, bits=bits, group_size=group_size)
    layer.check()
    assert (layer.layout.bits, layer.layout.group_size) == (bits, group_size)
    assert 0.2 < layer.dequantize_weight(torch.float32).std() * 512**0.5 < 5


def test_rows_after_the_sample_have_memory_of_their_own() -> None:
    layer = weights.affine_linear(4096, 64)
    assert layer.packed.untyped_storage().nbytes() == layer.nbytes() == layer.packed.numel() * 4
