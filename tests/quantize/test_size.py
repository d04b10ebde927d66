"""target_bits: the most bits that fit, then the smallest groups; what is set stays, what cannot be is refused."""

import pytest
import torch

from hf_spqr import ConfigError, SpQRConfig
from hf_spqr.quantize import quantize_model
from hf_spqr.quantize.driver import settle
from hf_spqr.quantize.size import Matrices, choose, fixed_bytes
from tests.tiny_models import tiny_model

WIDE = [Matrices("layers.0.up_proj", (4096, 4096), 1, 2 * 4096**2)]


def chosen(target, layers=WIDE, **fields):
    config = SpQRConfig(target_bits=target, **fields)
    choose(config, [layers])
    return config.bits, config.group_size


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (2.1, (2, 128)), (2.18, (2, 64)), (2.5, (2, 32)), (2.7, (2, 16)), (3.0, (2, 16)), (3.1, (3, 128)),
        (3.17, (3, 64)), (3.4, (3, 32)), (3.6, (3, 16)), (4.0, (3, 16)), (4.1, (4, 128)), (4.16, (4, 64)),
        (4.5, (4, 32)), (4.6, (4, 16)), (5.17, (5, 64)), (8.2, (8, 64)), (20, (8, 8)), (float("inf"), (8, 8)),
    ],
)  # fmt: skip
def test_most_bits_then_smallest_groups(target, size):
    assert chosen(target) == size


@pytest.mark.parametrize(
    ("fields", "target", "size"),
    [
        ({"bits": 3}, 4.2, (3, 16)),
        ({"bits": 3}, 4.6, (3, 8)),
        ({"bits": 3}, 3.2, (3, 64)),
        ({"group_size": 128}, 4.6, (4, 128)),
        ({"group_size": 8}, 4.6, (3, 8)),
        ({"group_size": -1}, 4.6, (4, -1)),
        ({"bits": 2, "group_size": 128}, 4.6, (2, 128)),
        ({"second_group": 32}, 4.26, (4, 32)),
        ({"scale_bits": 8, "zero_bits": 8}, 4.16, (4, 128)),
    ],
)
def test_what_is_set_stays(fields, target, size):
    assert chosen(target, **fields) == size


def test_sizes_are_those_of_the_file():
    """Panels that narrow layers do not fill, the order of columns, bits of single layers, all experts."""
    narrow = [Matrices("up_proj", (256, 256), 1, 2 * 256**2)]
    assert chosen(4.2, narrow) == (3, 16) != chosen(4.2)
    assert chosen(4.2, act_order=True) == chosen(4.2) == (4, 64)
    few_rows = [Matrices("up_proj", (64, 4096), 1, 2 * 64 * 4096)]
    assert chosen(4.2, few_rows, act_order=True) == (3, 16)
    down = Matrices("down_proj", (4096, 4096), 1, 0)
    assert chosen(4.2, [*WIDE, down], overrides={"down_proj": {"bits": 6}}) == (2, 64)
    assert chosen(4.2, [*WIDE, Matrices("experts.up_proj", (256, 256), 1, 0)]) == (4, 64)
    assert chosen(4.2, [*WIDE, Matrices("experts.up_proj", (256, 256), 512, 0)]) == (3, 16)


def test_every_stack_must_fit():
    config = SpQRConfig(target_bits=4.2)
    choose(config, [WIDE, [], [Matrices("decoder.up_proj", (256, 256), 1, 2 * 256**2)]])
    assert (config.bits, config.group_size) == (3, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_bits": 2.05}, r"2\.086 bits per weight with bits=2, group_size=128\. Set .* to at least that\.$"),
        ({"target_bits": 3.2, "bits": 3, "group_size": 16}, r"3\.633 bits .* or leave bits and group_size out"),
        ({"target_bits": 3.01, "bits": 3}, r"bits=3, group_size=128\. .* or leave bits out, to be chosen"),
        ({"target_bits": 2.5, "group_size": 8}, r"3\.258 bits .* or leave group_size out"),
    ],
)  # fmt: skip
def test_a_target_out_of_reach_says_what_is_in_reach(fields, message):
    with pytest.raises(ConfigError, match=message):
        choose(SpQRConfig(**fields), [WIDE])


def test_a_target_out_of_reach_stops_before_the_work(texts, tokenizer, monkeypatch):
    monkeypatch.setattr("hf_spqr.quantize.driver.calibration_windows", lambda *a, **k: pytest.fail("texts were read"))
    config = SpQRConfig(target_bits=2.01, dataset=texts)
    with pytest.raises(ConfigError, match=r"target_bits=2\.01 cannot be reached"):
        quantize_model(tiny_model("llama"), config, tokenizer=tokenizer, progress=False)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_chosen_from_an_empty_model_as_from_the_full_one(kind):
    model = tiny_model(kind, hidden_size=256, intermediate_size=512, torch_dtype=torch.bfloat16)
    with torch.device("meta"):
        empty = type(model)(model.config)
    full, of_empty = SpQRConfig(target_bits=3.6), SpQRConfig(target_bits=3.6)
    settle(model, full)
    settle(empty, of_empty)
    assert full == of_empty
    assert isinstance(full.bits, int) and isinstance(full.group_size, int)


def test_fixed_bytes_are_those_of_the_layouts():
    layers = [Matrices("up_proj", (48, 64), 3, 0), Matrices("down_proj", (64, 48), 1, 0)]
    config = SpQRConfig(overrides={"down_proj": {"bits": 4}})
    expected = 3 * config.layout(48, 64, "up_proj").fixed_bytes + config.layout(64, 48, "down_proj").fixed_bytes
    assert fixed_bytes(config, layers) == expected
    config.act_order = True
    assert fixed_bytes(config, layers) == expected + 4 * (3 * 64 + 48)
