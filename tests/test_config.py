"""SpQRConfig: validation that helps, JSON round trip, what is and is not stored."""

import copy
import json
import math
import warnings

import pytest

from hf_spqr import CheckpointError, ConfigError, SpQRConfig
from hf_spqr.config import FORMAT_VERSION, name_matches
from hf_spqr.formats.spqr import SpQRLayout


def test_defaults_and_round_trip():
    config = SpQRConfig()
    assert (config.bits, config.group_size, config.scale_bits, config.zero_bits, config.second_group) == (
        3,
        16,
        3,
        3,
        16,
    )
    assert (config.nsamples, config.seqlen, config.outlier_threshold) == (128, 2048, 0.2)
    stored = json.loads(config.to_json_string())
    assert stored["quant_method"] == "hf_spqr" and stored["format_version"] == FORMAT_VERSION
    assert SpQRConfig.from_dict(stored) == config


def test_full_round_trip():
    config = SpQRConfig(
        bits=4, group_size=-1, scale_bits=4, zero_bits=2, second_group=32, outlier_threshold=math.inf, act_order=True,
        percdamp=0.1, mode="reference", true_sequential=True, nsamples=3, seqlen=7, seed=5,
        modules_to_not_convert=["mlp"], overrides={"q_proj": {"bits": 2, "outlier_threshold": math.inf}},
    )  # fmt: skip
    text = config.to_json_string()
    assert "Infinity" not in text
    back = SpQRConfig.from_dict(json.loads(text))
    assert back == config
    assert back.outlier_threshold == math.inf
    assert back.layer_fields("a.q_proj")["outlier_threshold"] == math.inf


def test_a_target_leaves_bits_and_group_size_open():
    assert (SpQRConfig(None, None).bits, SpQRConfig(None, None).group_size) == (3, 16)
    config = SpQRConfig(target_bits=4.2)
    assert (config.bits, config.group_size) == (None, None)
    assert SpQRConfig.from_dict(json.loads(config.to_json_string())) == config
    assert (SpQRConfig(4, target_bits=4.2).bits, SpQRConfig(4, target_bits=4.2).group_size) == (4, None)
    assert SpQRConfig(group_size=64, target_bits=4.2).group_size == 64


def test_runtime_fields_are_never_stored():
    config = SpQRConfig(dataset=["text"], tokenizer="name", backend="int8_activations")
    for stored in (config.to_dict(), dict(config), json.loads(config.to_json_string()), config.to_diff_dict()):
        assert not {"dataset", "tokenizer", "backend"} & set(stored)
    assert config.get_loading_attributes() == {"backend": "int8_activations"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits=1: use a whole number from 2 to 8"),
        ({"bits": 9}, "from 2 to 8"),
        ({"bits": 3.0}, "whole number"),
        ({"bits": True}, "whole number"),
        ({"group_size": 12}, "use one of -1, 8, 16"),
        ({"group_size": 0}, "use one of"),
        ({"scale_bits": 9}, "scale_bits"),
        ({"zero_bits": 1}, "zero_bits"),
        ({"second_group": 64}, "use one of 16, 32"),
        ({"outlier_threshold": 0}, "above 0"),
        ({"outlier_threshold": math.nan}, "above 0"),
        ({"outlier_threshold": "many"}, "use a number"),
        ({"target_bits": 3, "bits": 3}, "above 3"),
        ({"target_bits": 2}, "above 2"),
        ({"target_bits": 4, "bits": 1}, "bits=1: use a whole number from 2 to 8"),
        ({"target_bits": 4, "group_size": 12}, "use one of -1, 8, 16"),
        ({"overrides": {"q_proj": {"bits": None}}}, "bits=None"),
        ({"act_order": 1}, "True or False"),
        ({"percdamp": -0.1}, "at least 0"),
        ({"mode": "fast"}, "'default', 'reference'"),
        ({"true_sequential": "yes"}, "True or False"),
        ({"nsamples": 0}, "at least 1"),
        ({"seqlen": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
        ({"modules_to_not_convert": "lm_head"}, "use a list"),
        ({"modules_to_not_convert": ["("]}, "not a valid regular expression"),
        ({"modules_to_not_convert": [3]}, "not a module name"),
        ({"overrides": {"q_proj": 4}}, "use a dict of fields"),
        ({"overrides": {"q_proj": {"mode": "reference"}}}, "cannot differ per layer"),
        ({"overrides": {"q_proj": {"bits": 1}}}, r"overrides\['q_proj'\]: bits=1"),
        ({"overrides": {"[": {"bits": 4}}}, "not a valid regular expression"),
        ({"backend": "cuda"}, "'auto', 'reference'"),
        ({"quant_method": "gptq"}, "does not belong to SpQRConfig"),
    ],
)
def test_wrong_fields_say_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        SpQRConfig(**fields)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_format_version_is_refused(version):
    with pytest.raises(CheckpointError, match="Install the version"):
        SpQRConfig(format_version=version)


def test_unknown_fields_warn_and_suggest():
    with pytest.warns(UserWarning, match="'outlier_treshold' is ignored. Did you mean 'outlier_threshold'"):
        config = SpQRConfig(outlier_treshold=0.1)
    assert "outlier_treshold" not in config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpQRConfig(quant_method="hf_spqr")


def test_deepcopy_shares_data():
    class Uncopyable:
        def __deepcopy__(self, memo):
            raise TypeError

    data = (line for line in ["a"])
    config = SpQRConfig(dataset=data, tokenizer=Uncopyable(), overrides={"a": {"bits": 4}})
    copied = copy.deepcopy(config)
    assert copied.dataset is data and copied.tokenizer is config.tokenizer
    assert copied == config and copied.overrides["a"] is not config.overrides["a"]
    copied.forget_data()
    assert config.dataset is data


def test_dict_like_get():
    assert SpQRConfig(bits=4).get("bits") == 4
    assert SpQRConfig().get("absent", 7) == 7


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("mlp", "model.layers.3.mlp.up_proj", True),
        ("layers.1", "model.layers.1.mlp.up_proj", True),
        ("layers.1", "model.layers.11.mlp.up_proj", False),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        (r"layers\.[01]\.", "model.layers.1.mlp.up_proj", True),
        (r"layers\.[01]\.", "model.layers.10.mlp.up_proj", False),
        (r"(up|gate)_proj$", "model.layers.10.mlp.up_proj", True),
        (r".*", "anything", True),
    ],
)
def test_name_patterns(pattern, name, expected):
    assert name_matches(pattern, name) is expected


def test_overrides_in_order_and_layout():
    config = SpQRConfig(overrides={"mlp": {"bits": 4}, r"down_proj$": {"bits": 5, "scale_bits": 4}})
    assert config.layer_fields("layers.0.mlp.up_proj")["bits"] == 4
    assert config.layer_fields("layers.0.mlp.down_proj")["bits"] == 5
    assert config.layer_fields("layers.0.self_attn.q_proj")["bits"] == 3
    layout = config.layout(48, 64, "layers.0.mlp.down_proj")
    assert layout == SpQRLayout(48, 64, bits=5, group_size=16, stat_bits=4, second_group=16)


@pytest.mark.parametrize(("fields", "order", "damping"), [
    ({}, False, 0.03),
    ({"mode": "reference"}, True, 1.0),
    ({"mode": "reference", "act_order": False}, False, 1.0),
    ({"act_order": True, "percdamp": 0.1}, True, 0.1),
])  # fmt: skip
def test_what_the_mode_decides_is_stored(fields, order, damping):
    config = SpQRConfig(**fields)
    before = config.params()
    config.settle()
    stored = config.to_dict()
    assert (stored["act_order"], stored["percdamp"]) == (order, damping)
    assert config.stores_order("model.layers.0.mlp.up_proj") is order
    assert (config.params().permutes, config.params().damping) == (before.permutes, before.damping)


def test_params_take_the_defaults_of_the_method():
    from hf_spqr.methods.base import SpQRParams

    assert SpQRConfig().params("x") == SpQRParams()
    params = SpQRConfig(percdamp=0.5, act_order=True, mode="reference").params("x")
    assert (params.percdamp, params.act_order, params.mode) == (0.5, True, "reference")


def test_data_objects_survive_the_transformers_config(tmp_path):
    from transformers import LlamaConfig

    model_config = LlamaConfig(quantization_config=SpQRConfig(dataset=object()))
    model_config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert SpQRConfig.from_dict(stored) == SpQRConfig()
