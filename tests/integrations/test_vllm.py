"""Packed layers in vLLM's own linear layers; skipped where vLLM is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from safetensors import safe_open
from transformers import AutoModelForCausalLM
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear as layers
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.models.utils import WeightsMapper

from hf_spqr import CheckpointError, ConfigError, OmniQuantConfig, SpQRConfig, UnsupportedLayerError
from hf_spqr.integrations import vllm as plugin
from tests.tiny_models import byte_tokenizer, tiny_model

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
DATA = {"nsamples": 4, "seqlen": 32}
KINDS = {
    "spqr": lambda texts: SpQRConfig(dataset=texts, outlier_threshold=0.05, **DATA),
    "ordered": lambda texts: SpQRConfig(dataset=texts, act_order=True, **DATA),
    "mixed": lambda texts: SpQRConfig(
        dataset=texts, overrides={"k_proj": {"bits": 4}}, modules_to_not_convert=["v_proj", "1.mlp.up_proj"], **DATA
    ),
    "w4": lambda texts: OmniQuantConfig(dataset=texts, bits=4, group_size=16, epochs=0, **DATA),
    "w4 mixed": lambda texts: OmniQuantConfig(
        dataset=texts, bits=4, group_size=16, epochs=0, overrides={"k_proj": {"bits": 8, "group_size": -1}}, **DATA
    ),
    "w4a8": lambda texts: OmniQuantConfig(dataset=texts, bits=4, group_size=-1, act_bits=8, epochs=0, **DATA),
    "w8a8 sym": lambda texts: OmniQuantConfig(
        dataset=texts, bits=8, group_size=-1, act_bits=8, act_sym=True, epochs=0, **DATA
    ),
    "channel": lambda texts: OmniQuantConfig(dataset=texts, bits=3, group_size=-1, sym=True, epochs=0, **DATA),
}


class Packed:
    """A quantized tiny Llama: the Transformers model, and its file as vLLM sees it."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.json = self.model.config.quantization_config.to_dict()
        with safe_open(folder / "model.safetensors", "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}

    def config(self) -> plugin.PackedVllmConfig:
        config = get_quantization_config(self.json["quant_method"]).from_config(self.json)
        config.packed_modules_mapping = FUSED
        return config

    def outputs(self, block: str, names: list[str], x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model.get_submodule(f"{block}.{name}")(x) for name in names], -1)

    def load(self, layer: nn.Module, block: str, names: list[str]) -> None:
        """As vLLM's models do: each tensor of the file to the parameter of its name, with the id of the shard."""
        ids = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1} if len(names) > 1 else {}
        for name in names:
            prefix = f"{block}.{name}."
            found = sorted(key for key in self.tensors if key.startswith(prefix))
            for key in reversed(found):  # not the order of the file: any must do
                target = getattr(layer, key.removeprefix(prefix))
                shard = (ids[name],) if name in ids else ()
                target.weight_loader(target, self.tensors[key], *shard)


@pytest.fixture(scope="module")
def packed(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Packed]:
    made = {}
    for kind, config in KINDS.items():
        base, folder = (tmp_path_factory.mktemp(f"{kind}{suffix}") for suffix in ("base", "packed"))
        tiny_model("llama", attention_bias=True, mlp_bias=True).save_pretrained(base)
        byte_tokenizer().save_pretrained(base)
        AutoModelForCausalLM.from_pretrained(base, quantization_config=config(texts)).save_pretrained(folder)
        made[kind] = Packed(folder)
    return made


@pytest.fixture(autouse=True)
def _vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


class World:
    """This process as one rank of several."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, rank: int, size: int) -> None:
        for module in (layers, parameter):
            self.monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            self.monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(monkeypatch)
    made(0, 1)
    return made


BLOCKS = {
    "qkv_proj": ("model.layers.1.self_attn", ["q_proj", "k_proj", "v_proj"], 64),
    "o_proj": ("model.layers.1.self_attn", ["o_proj"], 64),
    "gate_up_proj": ("model.layers.1.mlp", ["gate_proj", "up_proj"], 64),
    "down_proj": ("model.layers.1.mlp", ["down_proj"], 96),
}


def make(packed: Packed, which: str) -> nn.Module:
    """A layer of vLLM loaded from the file, as its Llama builds it."""
    block, names, _ = BLOCKS[which]
    config = packed.config()
    common = {"bias": True, "quant_config": config, "prefix": f"{block}.{which}", "return_bias": False}
    if which == "qkv_proj":
        layer = layers.QKVParallelLinear(64, 16, 4, 2, **common)
    elif which == "gate_up_proj":
        layer = layers.MergedColumnParallelLinear(64, [96, 96], **common)
    else:
        common |= {"reduce_results": False, "skip_bias_add": True}
        layer = layers.RowParallelLinear(96 if which == "down_proj" else 64, 64, **common)
    packed.load(layer, block, names)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def bias(packed: Packed, which: str) -> Tensor:
    block, names, _ = BLOCKS[which]
    return torch.cat([packed.model.get_submodule(f"{block}.{name}").bias.data for name in names])


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("which", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_equals_transformers_to_the_bit(packed, world, kind, which, tokens):
    block, names, width = BLOCKS[which]
    x = torch.randn(tokens, width)
    expected = packed[kind].outputs(block, names, x)
    layer = make(packed[kind], which)
    if layer.skip_bias_add:
        assert torch.equal(layer.bias, bias(packed[kind], which))
        torch.testing.assert_close(layer(x) + layer.bias, expected, rtol=1e-6, atol=1e-6)
        return
    start = 0
    for module in layer.packed_modules:
        here = slice(start, start + module.out_features)
        # a product with a weight that is not packed is torch's, whose sums depend on how memory is aligned
        close = 1e-6 if isinstance(module, nn.Linear) else 0
        torch.testing.assert_close(layer(x)[:, here], expected[:, here], rtol=close, atol=close)
        start = here.stop
    assert start == expected.shape[-1]


def test_matrices_are_joined_where_they_can_be(packed, world):
    assert len(make(packed["spqr"], "qkv_proj").packed_modules) == 1
    assert len(make(packed["w4a8"], "gate_up_proj").packed_modules) == 1
    mixed = make(packed["mixed"], "qkv_proj")  # 3 bit, 4 bit, not packed
    assert [getattr(getattr(m, "layout", None), "bits", None) for m in mixed.packed_modules] == [3, 4, None]
    assert [m.layout.bits for m in make(packed["w4 mixed"], "qkv_proj").packed_modules] == [4, 8, 4]
    assert make(packed["w4a8"], "o_proj").packed_modules[0].act_bits == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["spqr", "w4", "w4a8"])
def test_16_bit_inputs(packed, world, kind, dtype, monkeypatch):
    block, names, width = BLOCKS["qkv_proj"]
    x = torch.randn(5, width).to(dtype)
    layer = make(packed[kind], "qkv_proj")
    layer.to(dtype)
    modules = [packed[kind].model.get_submodule(f"{block}.{name}") for name in names]
    for module in modules:  # of one Transformers model, which other tests use in float32
        monkeypatch.setitem(module._parameters, "bias", nn.Parameter(module.bias.to(dtype)))
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), torch.cat([module(x) for module in modules], -1))


def test_nothing_is_kept_twice(packed, world):
    """vLLM remembers the weight loaders of all parameters, for a later reload."""
    layer = layers.RowParallelLinear(64, 64, quant_config=packed["spqr"].config(), prefix="model.layers.1.o_proj")
    shards = layer.packed_shards
    packed["spqr"].load(layer, *BLOCKS["o_proj"][:2])
    assert shards.sources
    layer.quant_method.process_weights_after_loading(layer)
    assert not shards.sources


def test_inputs_that_are_not_contiguous(packed, world):
    layer, x = make(packed["spqr"], "qkv_proj"), torch.randn(5, 128)
    assert torch.equal(layer(x[:, :64]), layer(x[:, :64].contiguous()))


@pytest.mark.parametrize("which", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_make_the_whole(packed, world, kind, which, monkeypatch):
    """Each rank has its rows (to the bit) or its columns, whose products add up."""
    block, names, width = BLOCKS[which]
    x = torch.randn(5, width)
    rows = which in ("qkv_proj", "gate_up_proj")
    outputs = []
    for rank in range(2):
        world(rank, 2)
        monkeypatch.setattr(plugin, "tensor_model_parallel_all_gather", lambda part: x)
        layer = make(packed[kind], which)
        assert (layer.packed_inputs is not None) == (kind in ("ordered", "w4a8", "w8a8 sym") and not rows)  # exchanged
        outputs.append(layer(x) if rows else layer(x[:, rank * width // 2 : (rank + 1) * width // 2]))
    expected = packed[kind].outputs(block, names, x)
    if rows:
        sizes = layer.output_partition_sizes
        ranks = [output.split(sizes, -1) for output in outputs]
        assert torch.equal(torch.cat([half for part in zip(*ranks, strict=True) for half in part], -1), expected)
    else:
        total = outputs[0] + outputs[1] + bias(packed[kind], which)
        assert (total - expected).norm() < 1e-4 * expected.norm()  # kernels round x to some 15 bits


def test_more_ranks_than_heads_of_k_and_v(packed, world):
    """Four ranks, two heads of k and v: two ranks have the same."""
    block, names, width = BLOCKS["qkv_proj"]
    x = torch.randn(3, width)
    q, k, v = packed["spqr"].outputs(block, names, x).split([64, 32, 32], -1)
    for rank in range(4):
        world(rank, 4)
        mine = slice(16 * (rank // 2), 16 * (rank // 2 + 1))
        expected = torch.cat([q[:, 16 * rank : 16 * (rank + 1)], k[:, mine], v[:, mine]], -1)
        assert torch.equal(make(packed["spqr"], "qkv_proj")(x), expected)


def test_ranks_that_cut_through_a_row_block_are_refused(packed, world):
    world(0, 4)  # 96 rows: 24 for each
    with pytest.raises(UnsupportedLayerError, match=r"gate_proj cannot be split.*multiples of 16.*tensor parallel"):
        make(packed["spqr"], "gate_up_proj")


def test_fused_in_the_file(packed, world):
    """Phi-3 has q, k and v as one matrix in its file: there is no shard id."""
    block, names, width = BLOCKS["o_proj"]
    x = torch.randn(3, width)
    layer = layers.MergedColumnParallelLinear(
        64, [40, 24], bias=True, quant_config=packed["spqr"].config(), prefix=f"{block}.both", return_bias=False
    )
    packed["spqr"].load(layer, block, names)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer(x), packed["spqr"].outputs(block, names, x))


def test_layers_left_alone_are_vllms(packed, world):
    config = packed["mixed"].config()
    assert isinstance(
        config.get_quant_method(layers.ReplicatedLinear(64, 64), "model.layers.0.self_attn.v_proj"),
        layers.UnquantizedLinearMethod,
    )
    # not named in the config, but not packed in the file: found out when it is loaded
    layer = layers.ReplicatedLinear(64, 64, bias=False, quant_config=config, prefix="vision.proj", return_bias=False)
    weight = torch.randn(64, 64)
    layer.weight.weight_loader(layer.weight, weight)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 64)
    assert isinstance(layer.quant_method, layers.UnquantizedLinearMethod)
    torch.testing.assert_close(layer(x), x @ weight.T)


def test_embeddings_and_heads_are_left_to_vllm(packed):
    assert packed["spqr"].config().get_quant_method(nn.Embedding(4, 4), "lm_head") is None


def test_names_that_vllm_changes_are_followed(packed, world):
    config = plugin.SpQRVllmConfig.from_config(
        {
            "quant_method": "hf_spqr",
            "overrides": {"model.language_model.layers.0.mlp.down_proj": {"bits": 4}, "q_proj": {"bits": 5}},
            "modules_to_not_convert": ["model.visual.blocks"],
        }
    )
    prefixes = {"model.language_model.": "language_model.model.", "model.visual.": "visual."}
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=prefixes))
    assert config.config.layout(16, 16, "language_model.model.layers.0.mlp.down_proj").bits == 4
    assert config.config.layout(16, 16, "language_model.model.layers.0.self_attn.q_proj").bits == 5
    assert config.config.layout(16, 16, "language_model.model.layers.0.self_attn.k_proj").bits == 3
    linear = layers.ReplicatedLinear(16, 16)
    method = config.get_quant_method(linear, "visual.blocks.0.proj")
    assert isinstance(method, layers.UnquantizedLinearMethod)


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        ("spqr", "q_proj.packed", None, "lacks model.layers.1.self_attn.q_proj.packed"),
        ("spqr", "k_proj.outlier", None, "lacks model.layers.1.self_attn.k_proj.packed"),
        ("spqr", "v_proj.packed", lambda t: t[:1], r"v_proj: 'packed' should be"),
        ("spqr", "v_proj.outlier_row", lambda t: t + 1, "v_proj: damaged packed layer"),
        ("spqr", "q_proj.perm", lambda t: torch.arange(64, dtype=torch.int32), "act_order is False"),
        ("ordered", "q_proj.perm", None, "q_proj: the config says that act_order is True"),
        ("ordered", "q_proj.perm", torch.zeros_like, "perm must hold each of 0 .. 63 once"),
    ],
)
def test_a_damaged_file_is_refused(packed, world, kind, name, change, message):
    damaged = Packed.__new__(Packed)
    damaged.__dict__ = dict(packed[kind].__dict__)
    full = f"model.layers.1.self_attn.{name}"
    tensors = dict(damaged.tensors)
    old = tensors.pop(full, torch.zeros(0))
    damaged.tensors = tensors if change is None else {**tensors, full: change(old)}
    with pytest.raises(CheckpointError, match=message):
        make(damaged, "qkv_proj")


def test_another_format_version_is_refused(packed):
    with pytest.raises(CheckpointError, match="format_version=2"):
        get_quantization_config("hf_spqr").from_config({**packed["spqr"].json, "format_version": 2})


@pytest.mark.parametrize("method", ["hf_spqr", "omniquant"])
def test_a_model_that_is_not_quantized_is_named(method):
    """``--quantization hf_spqr`` for it: vLLM makes the config without arguments."""
    with pytest.raises(ConfigError, match=r"config.json has no quantization_config.*hf-spqr quantize"):
        get_quantization_config(method)()


def test_quantized_attention_is_not_silent(packed):
    with pytest.warns(UserWarning, match="inside attention"):
        packed["w4a8"].config()


def test_unknown_ways_of_splitting_are_refused(packed, world):
    class Own(layers.MergedColumnParallelLinear):
        def weight_loader(self, *arguments):
            raise NotImplementedError

    world(0, 2)
    with pytest.raises(UnsupportedLayerError, match="way of its own"):
        Own(64, [64, 64], quant_config=packed["spqr"].config(), prefix="x")
    world(0, 1)
    layer = Own(64, [64, 64], quant_config=packed["spqr"].config(), prefix="x")
    with pytest.raises(UnsupportedLayerError, match="no shard 'index_q'"):
        layer.packed.weight_loader(layer.packed, torch.zeros(0), "index_q")


def test_a_loader_that_a_model_puts_on_the_weight_is_noticed(packed, world):
    """Mamba 2 does so where it has heads that must stay together: plain rows would be other ones."""
    block, names, _ = BLOCKS["o_proj"]
    for size in (1, 2):
        world(0, size)
        layer = layers.ColumnParallelLinear(
            64, 64, bias=True, quant_config=packed["spqr"].config(), prefix=f"{block}.o_proj", return_bias=False
        )
        layer.weight.weight_loader = lambda parameter, loaded: None
        packed["spqr"].load(layer, block, names)
        if size == 1:
            layer.quant_method.process_weights_after_loading(layer)
            continue
        with pytest.raises(UnsupportedLayerError, match=r"o_proj: ColumnParallelLinear splits.*way of its own"):
            layer.quant_method.process_weights_after_loading(layer)


def test_entry_point():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["vllm.general_plugins"]["hf_spqr"]
    EntryPoint("hf_spqr", target, "vllm.general_plugins").load()()
    assert get_quantization_config("hf_spqr") is plugin.SpQRVllmConfig
    assert get_quantization_config("omniquant") is plugin.OmniQuantVllmConfig
