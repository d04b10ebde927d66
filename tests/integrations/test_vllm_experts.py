"""Packed experts in vLLM's own layer for them; skipped where vLLM is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from safetensors import safe_open
from transformers import AutoModelForCausalLM
from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe import config as fused_moe_config
from vllm.model_executor.layers.quantization import get_quantization_config

from hf_spqr import CheckpointError, ConfigError, OmniQuantConfig, SpQRConfig, UnsupportedLayerError
from hf_spqr.integrations import vllm as plugin
from hf_spqr.integrations.vllm_experts import PackedExpertsMethod
from hf_spqr.nn import PackedExperts
from tests.tiny_models import byte_tokenizer, tiny_model

DATA = {"nsamples": 4, "seqlen": 32}
CASES = {
    "spqr": ("mixtral", lambda texts: SpQRConfig(dataset=texts, outlier_threshold=0.05, **DATA)),
    "ordered": ("qwen3_moe", lambda texts: SpQRConfig(dataset=texts, act_order=True, **DATA)),
    "mixed": (
        "mixtral",
        lambda texts: SpQRConfig(dataset=texts, overrides={"mlp.experts.down_proj": {"bits": 5}}, **DATA),
    ),
    "w4": ("olmoe", lambda texts: OmniQuantConfig(dataset=texts, bits=4, group_size=16, epochs=0, **DATA)),
    "w4a8": (
        "mixtral",
        lambda texts: OmniQuantConfig(
            dataset=texts, bits=4, group_size=-1, act_bits=8, act_sym=True, epochs=0,
            learning={"quantize_attention": False}, **DATA,
        ),
    ),
}  # fmt: skip
NAMES = {"mixtral": ("block_sparse_moe", ("w1", "w2", "w3"))}
EXPERTS, TOP_K, HIDDEN = 4, 2, 64


class Packed:
    """A quantized tiny mixture of experts: the Transformers module of its second layer, and its file."""

    def __init__(self, kind: str, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        self.experts: PackedExperts = model.model.layers[1].mlp.experts
        self.json = model.config.quantization_config.to_dict()
        parent, self.ckpt_names = NAMES.get(kind, ("mlp", ("gate_proj", "down_proj", "up_proj")))
        self.prefix = f"model.layers.1.{parent}.experts"
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith(self.prefix)]
            self.tensors = {name.removeprefix(f"{self.prefix}."): file.get_tensor(name) for name in names}

    def config(self) -> plugin.PackedVllmConfig:
        return get_quantization_config(self.json["quant_method"]).from_config(self.json)

    def layer(self, size: int = 1, **changes: object) -> RoutedExperts:
        arguments = {
            "num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN,
            "intermediate_size": self.experts.kind.intermediate, "params_dtype": torch.float32,
            "quant_config": self.config(), "tp_size": size, "dp_size": 1, "pcp_size": 1, "prefix": self.prefix,
            "ckpt_names": self.ckpt_names, **changes,
        }  # fmt: skip
        get_current_vllm_config().compilation_config.static_forward_context.clear()  # it refuses a name twice
        return FusedMoEFactory(**arguments).routed_experts

    def loaded(self, size: int = 1, **changes: object) -> RoutedExperts:
        layer = self.layer(size, **changes)
        # not the order of the file: any must do
        done = set(layer.load_weights((name, tensor.clone()) for name, tensor in reversed(self.tensors.items())))
        assert {"w13_packed", "w2_packed"} <= done
        layer.quant_method.process_weights_after_loading(layer)
        return layer


@pytest.fixture(scope="module")
def packed(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Packed]:
    made = {}
    for name, (kind, config) in CASES.items():
        base, folder = (tmp_path_factory.mktemp(f"{name}{suffix}") for suffix in ("base", "packed"))
        # a whole number of vectors: torch's silu of a slice differs from that of a whole tensor in what is left over
        tiny_model(kind, moe_intermediate_size=96).save_pretrained(base)
        byte_tokenizer().save_pretrained(base)
        AutoModelForCausalLM.from_pretrained(base, quantization_config=config(texts)).save_pretrained(folder)
        made[name] = Packed(kind, folder)
    return made


@pytest.fixture(autouse=True)
def vllm_config(monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmConfig]:
    config = VllmConfig()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch):
    """Make this process one rank of several."""

    def make(number: int) -> None:
        monkeypatch.setattr(fused_moe_config, "get_tensor_model_parallel_rank", lambda: number)

    return make


def routed(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weights and experts of each token; one expert gets none."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.rand(tokens, EXPERTS - 1, generator=generator).topk(TOP_K).indices
    return x, torch.rand(tokens, TOP_K, generator=generator), ids.to(torch.int32)


def expected(packed: Packed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return packed.experts(x, ids.long(), weights)


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("case", CASES)
def test_one_rank_equals_transformers_to_the_bit(packed, case, tokens):
    layer = packed[case].loaded()
    assert isinstance(layer.quant_method, PackedExpertsMethod)
    x, weights, ids = routed(tokens)
    assert torch.equal(layer.forward_modular(x, weights, ids), expected(packed[case], x, weights, ids))
    assert all(parameter.dtype == torch.int32 or not parameter.numel() for parameter in layer.parameters())


def test_tokens_of_no_expert_give_zeros(packed):
    x, weights, ids = routed(5)
    ids[2] = -1
    y = packed["spqr"].loaded().forward_modular(x, weights, ids)
    assert not y[2].any()
    keep = [0, 1, 3, 4]
    assert torch.equal(y[keep], expected(packed["spqr"], x[keep], weights[keep], ids[keep]))


def test_weights_on_the_input(packed):
    """Llama 4 multiplies a token by its weight before the expert."""
    x, weights, ids = routed(6)
    ones = torch.ones(6, 1)
    y = packed["spqr"].loaded(apply_router_weight_on_input=True).forward_modular(x, weights[:, :1], ids[:, :1])
    assert torch.equal(y, expected(packed["spqr"], x * weights[:, :1], ones, ids[:, :1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs(packed, dtype):
    x, weights, ids = routed(9)
    y = packed["spqr"].loaded(params_dtype=dtype).forward_modular(x.to(dtype), weights, ids)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected(packed["spqr"], x, weights, ids), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize(("case", "size"), [("spqr", 2), ("ordered", 2), ("w4a8", 2), ("spqr", 4)])
def test_ranks_add_up(packed, vllm_config, rank, case, size, expert_parallel):
    """Each has some of the experts, whichever of its two ways vLLM was asked for."""
    vllm_config.parallel_config.enable_expert_parallel = expert_parallel
    x, weights, ids = routed(11)
    total = torch.zeros_like(x)
    for number in range(size):
        rank(number)
        layer = packed[case].loaded(size)
        assert layer.packed_experts["w2"].experts == EXPERTS // size
        total += layer.forward_modular(x, weights, ids)
    torch.testing.assert_close(total, expected(packed[case], x, weights, ids), rtol=1e-5, atol=1e-6)


def test_more_ranks_than_experts(packed, rank):
    rank(0)
    with pytest.raises(ConfigError, match=r"block_sparse_moe.experts: 4 experts cannot be divided among 8 ranks"):
        packed["spqr"].layer(8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"has_bias": True}, "packed experts with biases"),
        ({"activation": "swigluoai"}, "the activation swigluoai"),
        ({"swiglu_limit": 7.0}, "a clamp before"),
    ],
)
def test_what_is_not_computed_is_refused(packed, changes, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        packed["spqr"].layer(**changes)


def test_cuda_graphs_are_refused(packed, vllm_config):
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    with pytest.raises(UnsupportedLayerError, match="--enforce-eager"):
        packed["spqr"].layer()


def test_experts_left_alone_are_vllms(packed):
    left = packed["spqr"].config()
    left.config.modules_to_not_convert = ["experts.up_proj"]
    assert isinstance(packed["spqr"].layer(quant_config=left).quant_method, UnquantizedFusedMoEMethod)


def test_dense_experts_that_the_config_does_not_name_are_refused(packed):
    layer = packed["spqr"].layer()
    with pytest.raises(UnsupportedLayerError, match="not packed in the file"):
        list(layer.load_weights([("1.w1.weight", torch.zeros(96, HIDDEN))]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("2.w3.packed", None, r"up_proj: .*packed"),
        ("2.w1.packed", lambda t: t[:1], r"gate_proj: 'packed'"),
        ("3.w2.outlier_row", lambda t: t + 1, "down_proj: damaged"),
    ],
)
def test_a_damaged_file_is_refused(packed, name, change, message):
    damaged = Packed.__new__(Packed)
    damaged.__dict__ = dict(packed["spqr"].__dict__)
    damaged.tensors = dict(damaged.tensors)
    old = damaged.tensors.pop(name)
    if change is not None:
        damaged.tensors[name] = change(old)
    with pytest.raises(CheckpointError, match=message):
        damaged.loaded()


def test_a_missing_expert_is_named(packed):
    damaged = Packed.__new__(Packed)
    damaged.__dict__ = dict(packed["spqr"].__dict__)
    damaged.tensors = {name: tensor for name, tensor in damaged.tensors.items() if not name.startswith("2.w2.")}
    with pytest.raises(CheckpointError, match=r"lacks expert 2 of .*\.block_sparse_moe\.experts\.down_proj"):
        damaged.loaded()
