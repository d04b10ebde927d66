"""The ordinary layers: one view of nn.Linear and of Conv1D, which stores its weight transposed."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_spqr.formats.spqr import SpQRLayout
from hf_spqr.nn import SpQRLinear, dense
from tests.weights import random_spqr


def conv1d() -> Conv1D:
    layer = Conv1D(48, 96)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("layer", [nn.Linear(96, 48), nn.Linear(96, 48, bias=False), conv1d()])
def test_matrix_is_the_weight_of_a_linear(layer):
    assert dense.features(layer) == (48, 96) and dense.matrix(layer).shape == (48, 96)
    x = torch.randn(2, 3, 96)
    torch.testing.assert_close(nn.functional.linear(x, dense.matrix(layer), layer.bias), layer(x))
    again = dense.make_dense(dense.kind(layer), dense.matrix(layer), layer.bias)
    assert type(again) is type(layer)
    assert torch.equal(again(x), layer(x))
    dense.set_matrix(layer, 2 * dense.matrix(layer))
    torch.testing.assert_close(dense.matrix(layer), 2 * dense.matrix(again))


def test_a_packed_layer_gives_back_the_class_it_replaced():
    weight = random_spqr(SpQRLayout(48, 96))
    packed = SpQRLinear.from_weight(weight, torch.randn(48), torch.float32)
    packed.replaces = Conv1D
    plain = packed.to_linear()
    assert type(plain) is Conv1D and plain.weight.shape == (96, 48)
    torch.testing.assert_close(plain(torch.ones(1, 96)), packed(torch.ones(1, 96)), rtol=1e-4, atol=1e-3)


def test_subclasses_become_linear_layers():
    class Other(nn.Linear):
        pass

    assert dense.kind(Other(4, 4)) is nn.Linear and dense.kind(conv1d()) is Conv1D
