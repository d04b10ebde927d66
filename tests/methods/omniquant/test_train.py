from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from hf_spqr.calibration.blocks import find_blocks, record
from hf_spqr.errors import CalibrationError, ConfigError, NonFiniteError, UnsupportedLayerError
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.methods.omniquant import BlockResult, OmniQuantParams, preset, quantize_block, train
from hf_spqr.methods.omniquant.runner import BlockRunner

FAST = {"epochs": 6, "batch_size": 2}


def make_block(attention: str = "sdpa", opt: bool = False) -> tuple[nn.Module, Tensor, Mapping[str, Any]]:
    torch.manual_seed(0)
    if opt:
        config: Any = OPTConfig(
            vocab_size=61, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=32, attn_implementation=attention,
        )  # fmt: skip
        model: nn.Module = OPTForCausalLM(config).eval()
    else:
        config = LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, attn_implementation=attention,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    blocks = find_blocks(model)
    recording = record(model, blocks, [torch.randint(0, 60, (1, 16)) for _ in range(8)])
    return blocks[0].module, torch.cat(recording.hidden), recording.calls[0][0].kwargs


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def quantize(params: OmniQuantParams, **kwargs: Any) -> tuple[nn.Module, Tensor, Mapping[str, Any], BlockResult]:
    block, hidden, given = make_block(**kwargs)
    return block, hidden, given, quantize_block(block, hidden, hidden, given, params, linears_of(block))


@pytest.mark.parametrize("name", ["W2A16g32", "W3A16", "W4A4", "W8A8"])
@pytest.mark.parametrize("reference", [False, True])
def test_stored_tensors_reproduce_the_reported_output(name: str, reference: bool) -> None:
    params = replace(preset(name, reference=reference), **FAST)
    block, hidden, kwargs, result = quantize(params)
    assert result.loss_final <= result.loss_initial and result.skipped == 0
    assert set(result.weights) == set(linears_of(block))
    tensors = {f"{key}.weight": weight.dequantize() for key, weight in result.weights.items()} | result.folded
    runner = BlockRunner(block, kwargs, list(result.weights))
    bits = params.act_bits
    with torch.no_grad():
        out = runner(hidden, range(len(hidden)), tensors, bits, bits)
        torch.testing.assert_close(runner(hidden, range(len(hidden))), result.outputs_fp, rtol=1e-5, atol=1e-5)
    close = (out - result.outputs_q).abs() < 1e-4  # at few activation bits, a rounding may fall the other way
    assert close.float().mean() > (0.999 if bits is None else 0.9)


def test_errors_are_measured_in_the_metric() -> None:
    block, hidden, kwargs = make_block()
    params, linears = replace(preset("W2A16g32"), epochs=20, batch_size=2, rounding_lr=0.03), linears_of(block)
    metric = torch.diag(torch.cat([torch.full((8,), 3.9), torch.full((24,), 0.1 / 3)]))  # the first eight count
    plain = quantize_block(block, hidden, hidden, kwargs, params, linears)
    weighted = quantize_block(block, hidden, hidden, kwargs, params, linears, metric=metric)
    off = quantize_block(block, hidden, hidden, kwargs, replace(params, fisher=False), linears, metric=metric)
    assert torch.equal(off.outputs_q, plain.outputs_q) and off.loss_final == plain.loss_final
    errors = [(result.outputs_q - result.outputs_fp).square().mean((0, 1)) for result in (plain, weighted)]
    assert float(errors[1][:8].mean()) < 0.8 * float(errors[0][:8].mean())
    assert float(errors[1][8:].mean()) > float(errors[0][8:].mean())
    everywhere = quantize_block(
        block, hidden, hidden, kwargs, replace(params, holdout=0.0), linears, metric=metric
    )  # judged on all samples
    error = everywhere.outputs_q - everywhere.outputs_fp
    assert everywhere.loss_final == pytest.approx(float((error @ metric * error).mean()), rel=1e-4)
    assert everywhere.loss_final < everywhere.loss_nearest
    with pytest.raises(CalibrationError, match=r"metric \[32, 32\], got \[31, 32\]"):
        quantize_block(block, hidden, hidden, kwargs, params, linears, metric=metric[1:])


@pytest.mark.parametrize("name", ["W2A16g32", "W4A4"])
@pytest.mark.parametrize("reference", [False, True])
def test_layers_of_a_block_may_be_stored_in_their_own_ways(name: str, reference: bool) -> None:
    params = replace(preset(name, reference=reference), **FAST)
    block, hidden, kwargs = make_block()
    linears = linears_of(block)
    own = {
        "mlp.down_proj": AffineLayout(32, 48, 8, -1),
        "self_attn.q_proj": AffineLayout(32, 32, 4, params.group_size, symmetric=True),
    }
    same = quantize_block(block, hidden, hidden, kwargs, params, linears)
    result = quantize_block(block, hidden, hidden, kwargs, params, linears, layouts=own)
    for layer, weight in result.weights.items():
        assert weight.layout == own.get(layer, params.layout(*linears[layer].weight.shape))
        assert int(weight.codes.max()) < 2**weight.layout.bits
    assert int(result.weights["mlp.down_proj"].codes.max()) > 15
    assert result.loss_nearest < same.loss_nearest and result.loss_final <= result.loss_initial
    tensors = {f"{key}.weight": weight.dequantize() for key, weight in result.weights.items()} | result.folded
    runner, bits = BlockRunner(block, kwargs, list(linears)), params.act_bits
    with torch.no_grad():
        out = runner(hidden, range(len(hidden)), tensors, bits, bits)
    close = (out - result.outputs_q).abs() < 1e-4
    assert close.float().mean() > (0.999 if bits is None else 0.9)


def test_learning_helps_and_never_touches_the_block() -> None:
    block, hidden, kwargs = make_block()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    params = replace(preset("W2A16g32"), epochs=20, batch_size=2)
    result = quantize_block(block, hidden, hidden, kwargs, params, linears_of(block))
    assert result.loss_final < 0.5 * result.loss_nearest
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_the_best_state_on_the_samples_kept_out_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the last one, where it is judged to be worse."""
    scores: list[float] = []
    judge = train._Job._judge

    def worse_from_the_fifth_on(job: Any, student: nn.Module) -> float:
        scores.append(judge(job, student))
        return scores[-1] if len(scores) <= 2 + 4 else 1e9  # two are of the start

    monkeypatch.setattr(train._Job, "_judge", worse_from_the_fifth_on)
    result = quantize(replace(preset("W3A16g32"), epochs=10, batch_size=2))[3]
    best = min(scores[:6])
    assert len(scores) == 2 + 10 and best < scores[1] and scores[-1] < 0.99 * best
    assert result.loss_final == pytest.approx(best, rel=1e-5)


def test_same_seed_same_weights() -> None:
    results = [quantize(replace(preset("W3A16"), **FAST))[-1] for _ in range(2)]
    for name, weight in results[0].weights.items():
        assert torch.equal(weight.codes, results[1].weights[name].codes)


def test_transforms_take_outliers_away() -> None:
    block, hidden, kwargs = make_block()
    with torch.no_grad():
        for norm, consumers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            block.get_parameter(f"{norm}.weight")[:3] *= 50
            for name in consumers:
                block.get_parameter(f"{name}.weight")[:, :3] /= 50
    result = quantize_block(block, hidden, hidden, kwargs, replace(preset("W4A4"), **FAST), linears_of(block))
    assert len(result.pairs) == 5
    assert result.loss_initial < 0.3 * result.loss_nearest and result.loss_final <= result.loss_initial
    assert set(result.folded) >= {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_shifts_are_learned_where_there_are_biases() -> None:
    *_, result = quantize(replace(preset("W4A4"), **FAST), opt=True)
    assert "self_attn_layer_norm.bias" in result.folded and "self_attn.out_proj.bias" in result.folded
    assert result.loss_final <= result.loss_initial


def test_bad_steps_are_skipped_and_counted() -> None:
    """An input whose output is not finite under quantization costs its step and nothing else."""
    block, hidden, kwargs = make_block()
    poisoned = hidden.clone()
    poisoned[3] = math.inf
    params = replace(preset("W3A16"), holdout=0.0, epochs=4, batch_size=1)
    with pytest.raises(NonFiniteError, match="before training"):
        quantize_block(block, hidden, poisoned, kwargs, params, linears_of(block))
    params = replace(params, holdout=0.25, seed=next(s for s in range(99) if 3 not in _held_out(s)))
    result = quantize_block(block, hidden, poisoned, kwargs, params, linears_of(block))
    assert result.skipped == 4 and result.loss_final < result.loss_initial
    with pytest.raises(NonFiniteError, match="full-precision"):
        quantize_block(block, poisoned, poisoned, kwargs, params, linears_of(block))


def _held_out(seed: int) -> list[int]:
    return torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()[:2]


def test_a_training_that_only_harms_is_thrown_away() -> None:
    params = replace(preset("W4A16", reference=True), lwc_lr=50.0, epochs=2)
    *_, result = quantize(params)
    assert result.kept_initial and result.loss_final == result.loss_initial


def test_eager_attention_is_quantized_like_sdpa() -> None:
    outputs = []
    for attention in ("sdpa", "eager"):
        block, hidden, kwargs = make_block(attention)
        runner = BlockRunner(block, kwargs, [])
        with torch.no_grad():
            outputs.append([runner(hidden, range(8), None, None, bits) for bits in (None, 4)])
    for ours, theirs in zip(*outputs, strict=True):
        assert ((ours - theirs).abs() < 1e-4).float().mean() > 0.99
    assert (outputs[0][0] - outputs[0][1]).abs().mean() > 1e-3


def test_attention_that_cannot_be_quantized_is_refused() -> None:
    block = nn.Sequential(nn.Linear(8, 8))
    hidden = torch.randn(4, 6, 8)
    with pytest.raises(UnsupportedLayerError, match="sdpa"):
        quantize_block(block, hidden, hidden, {}, preset("W4A4"), linears_of(block))


def test_streams_and_layouts_must_agree() -> None:
    block, hidden, kwargs = make_block()
    wrong = {"mlp.down_proj": AffineLayout(48, 32, 4)}
    with pytest.raises(ConfigError, match=r"not that of a weight \[32, 48\]"):
        quantize_block(block, hidden, hidden, kwargs, OmniQuantParams(), linears_of(block), layouts=wrong)
    with pytest.raises(CalibrationError, match="two streams"):
        quantize_block(block, hidden, hidden[:2], kwargs, OmniQuantParams(), linears_of(block))


def test_kwargs_of_each_sample_are_batched() -> None:
    block, hidden, kwargs = make_block()
    cos, sin = kwargs["position_embeddings"]
    each = [{**kwargs, "position_embeddings": (cos.roll(i, 1), sin.roll(i, 1))} for i in range(len(hidden))]
    runner = BlockRunner(block, each, [])
    with torch.no_grad():
        together = runner(hidden[[2, 5]], [2, 5])
        torch.testing.assert_close(together[1:], runner(hidden[5:6], [5]))
    with pytest.raises(CalibrationError, match="one each"):
        runner(hidden[:1], [8])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_blocks_keep_their_dtype(dtype: torch.dtype) -> None:
    block, hidden, kwargs = make_block()
    block, hidden = block.to(dtype), hidden.to(dtype)
    params = replace(preset("W4A4"), **FAST, scale_dtype=torch.bfloat16)
    result = quantize_block(block, hidden, hidden, kwargs, params, linears_of(block))
    assert result.outputs_q.dtype == dtype and all(value.dtype == dtype for value in result.folded.values())
    assert result.loss_final <= result.loss_initial
    autocast = quantize_block(block, hidden, hidden, kwargs, replace(params, autocast=True), linears_of(block))
    assert math.isfinite(autocast.loss_final)
