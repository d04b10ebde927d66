"""Layers that an engine fuses or splits, without an engine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_spqr import CheckpointError, OmniQuantConfig, SpQRConfig, UnsupportedLayerError
from hf_spqr.formats import affine, spqr
from hf_spqr.integrations.shards import Part, Shards
from hf_spqr.nn import AffineLinear, SpQRLinear
from tests.weights import random_affine, random_spqr

NAMES = ["x.q_proj", "x.k_proj", "x.v_proj"]
ROWS = [64, 32, 24]
COLUMNS = 384
SPQR, AFFINE = SpQRConfig(), OmniQuantConfig(bits=4, group_size=32)


def tensors(config, name: str, rows: int, seed: int = 0) -> dict[str, Tensor]:
    layout = config.layout(rows, COLUMNS, name)
    if isinstance(config, SpQRConfig):
        return spqr.pack(random_spqr(layout, 0.02, seed=seed))
    return affine.pack(random_affine(layout, seed=seed))


def shards(config, parts: list[Part] | None = None, columns: tuple[int, int] = (0, COLUMNS)) -> Shards:
    kind = SpQRLinear if isinstance(config, SpQRConfig) else AffineLinear
    whole = [Part(name, rows, 0, rows) for name, rows in zip(NAMES, ROWS, strict=True)]
    cpu = torch.device("cpu")
    return Shards(config, kind, "x.qkv_proj", parts or whole, COLUMNS, columns, torch.float32, cpu)


def fill(into: Shards, found: list[dict[str, Tensor]]) -> None:
    """All tensors, one kind after the other."""
    for name in sorted({name for each in found for name in each}):
        for index, each in enumerate(found):
            if name in each:
                into.add(name, each[name], index, index + 1)


def weight(modules: list[nn.Module]) -> Tensor:
    dense = [m.weight if isinstance(m, nn.Linear) else m.dequantize_weight(torch.float32) for m in modules]
    return torch.cat(dense).detach()


def decode(config, name: str, rows: int, found: dict[str, Tensor]) -> Tensor:
    kind = SpQRLinear if isinstance(config, SpQRConfig) else AffineLinear
    return kind(config.layout(rows, COLUMNS, name), found).dequantize_weight(torch.float32)


@pytest.mark.parametrize("config", [SPQR, AFFINE], ids=["spqr", "affine"])
def test_equal_layouts_become_one_module(config):
    found = [tensors(config, name, rows, seed=rows) for name, rows in zip(NAMES, ROWS, strict=True)]
    made = shards(config)
    fill(made, found)
    bias = torch.randn(sum(ROWS))
    (module,) = modules = made.modules(bias)
    assert torch.equal(module.bias, bias) and not made.sources
    expected = [decode(config, *each) for each in zip(NAMES, ROWS, found, strict=True)]
    assert torch.equal(weight(modules), torch.cat(expected))


def test_different_layouts_and_dense_weights_stay_apart():
    config = SpQRConfig(overrides={"k_proj": {"bits": 4}})
    found = [tensors(config, name, rows) for name, rows in zip(NAMES, ROWS, strict=True)]
    found[2] = {"weight": torch.randn(24, COLUMNS)}
    made = shards(config)
    fill(made, found)
    assert not made.all_dense()
    modules = made.modules(torch.arange(120.0))
    assert [type(module) for module in modules] == [SpQRLinear, SpQRLinear, nn.Linear]
    assert [float(module.bias[0]) for module in modules] == [0, 64, 96]
    assert torch.equal(modules[2].weight, found[2]["weight"])


def test_column_orders_must_agree_to_be_joined():
    config = SpQRConfig(act_order=True)
    for seeds, count in (((1, 1, 1), 1), ((1, 2, 2), 2)):
        found = [tensors(config, *each) for each in zip(NAMES, ROWS, strict=True)]
        for each, seed in zip(found, seeds, strict=True):
            each["perm"] = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(seed)).int()
        made = shards(config)
        fill(made, found)
        modules = made.modules(None)
        assert len(modules) == count
        expected = [decode(config, *each) for each in zip(NAMES, ROWS, found, strict=True)]
        assert torch.equal(weight(modules), torch.cat(expected))


@pytest.mark.parametrize("config", [SPQR, AFFINE], ids=["spqr", "affine"])
@pytest.mark.parametrize("columns", [(0, 256), (256, 384), (96, 288)])
def test_rows_and_columns_of_a_device(config, columns):
    parts = [Part(NAMES[0], 64, 32, 64), Part(NAMES[1], 32, 16, 32), Part(NAMES[2], 24, 16, 24)]
    found = [tensors(config, name, rows, seed=rows) for name, rows in zip(NAMES, ROWS, strict=True)]
    made = shards(config, parts, columns)
    fill(made, found)
    expected = [decode(config, *each) for each in zip(NAMES, ROWS, found, strict=True)]
    mine = [whole[part.start : part.stop, slice(*columns)] for whole, part in zip(expected, parts, strict=True)]
    assert torch.equal(weight(made.modules(None)), torch.cat(mine))


def test_columns_in_an_order_of_their_own():
    """They are split in that order: the parts add up if each takes the inputs that its columns need."""
    found = tensors(SPQR, "x.o_proj", 64)
    found["perm"] = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0)).int()
    x, total = torch.randn(3, COLUMNS).double(), torch.zeros(3, 64).double()
    for columns in ((0, 256), (256, 384)):
        made = shards(SPQR, [Part("x.o_proj", 64, 0, 64)], columns)
        fill(made, [found])
        inputs = made.inputs()
        total += x[:, inputs] @ weight(made.modules(None)).double().T
    torch.testing.assert_close(total, x @ decode(SPQR, "x.o_proj", 64, found).double().T, rtol=1e-10, atol=1e-8)
    assert shards(SPQR).inputs() is None


def test_a_matrix_that_is_fused_in_the_file():
    """Cut between its parts only if the device has not all rows of them."""
    found = tensors(SPQR, "x.qkv_proj", 120)
    expected = decode(SPQR, "x.qkv_proj", 120, found)
    for parts in ([Part("a", 40, 0, 40), Part("b", 80, 0, 80)], [Part("a", 48, 32, 48), Part("b", 72, 16, 32)]):
        made = shards(SPQR, parts)
        for name, tensor in found.items():
            made.add(name, tensor)
        rows = [*range(parts[0].start, parts[0].stop)]
        rows += [parts[0].rows + row for row in range(parts[1].start, parts[1].stop)]
        assert torch.equal(weight(made.modules(None)), expected[rows])


def test_loaders_may_reuse_their_memory():
    found = tensors(SPQR, "x.o_proj", 64)
    expected = decode(SPQR, "x.o_proj", 64, found)
    made = shards(SPQR, [Part("x.o_proj", 64, 0, 64)])
    buffers = {name: tensor.clone() for name, tensor in found.items()}
    for name, buffer in buffers.items():
        made.add(name, buffer)
        buffer.zero_()
    assert torch.equal(weight(made.modules(None)), expected)


def test_what_is_wrong_is_said():
    found = tensors(SPQR, "x.o_proj", 64)

    def made(changes, columns=(0, COLUMNS), rows=(0, 64), config=SPQR):
        into = shards(config, [Part("x.o_proj", 64, *rows)], columns)
        for name, tensor in {**found, **changes}.items():
            into.add(name, tensor)
        into.inputs()
        return into.modules(None)

    assert len(made({})) == 1
    with pytest.raises(CheckpointError, match=r"lacks x.o_proj.packed"):
        shards(SPQR, [Part("x.o_proj", 64, 0, 64)]).modules(None)
    with pytest.raises(CheckpointError, match=r"x.o_proj: 'packed' should be"):
        made({"packed": found["packed"][:, :-16]})
    with pytest.raises(CheckpointError, match=r"x.o_proj: damaged packed layer: outlier_row must be .* \[65\]"):
        made({"outlier_row": found["outlier_row"][:-1]})
    with pytest.raises(CheckpointError, match=r"x.o_proj.weight should be \(64, 384\)"):
        made({"weight": torch.zeros(64, 100)})
    with pytest.raises(CheckpointError, match="perm must hold each"):
        made({"perm": torch.zeros(COLUMNS, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match="act_order is True"):
        made({}, config=SpQRConfig(act_order=True))
    with pytest.raises(UnsupportedLayerError, match=r"x.o_proj cannot be split.*multiples of 16"):
        made({}, rows=(8, 24))
    with pytest.raises(UnsupportedLayerError, match=r"x.o_proj cannot be split.*columns 8 to 32"):
        made({}, columns=(8, 32))
    with pytest.raises(CheckpointError, match="perm must hold each"):
        made({"perm": torch.zeros(COLUMNS, dtype=torch.int32)}, columns=(0, 256))
