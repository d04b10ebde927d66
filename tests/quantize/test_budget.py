"""target_bits: one threshold that lands within one percent, counted from the packed bytes."""

import pytest
import torch

from hf_spqr import ConfigError, SpQRConfig
from hf_spqr.methods.base import SpQRParams
from hf_spqr.nn import SpQRLinear
from hf_spqr.quantize import layerwise, quantize_model
from hf_spqr.quantize.budget import BINS, HIGHEST, LOWEST, Budget, LayerScores, survey_layer
from tests.tiny_models import tiny_model


def run(texts, tokenizer, model=None, **fields):
    model = model or tiny_model("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    config = SpQRConfig(dataset=texts, nsamples=8, seqlen=64, **fields)
    return quantize_model(model, config, tokenizer=tokenizer, progress=False), config, model


def counted(model):
    layers = [m for m in model.modules() if isinstance(m, SpQRLinear)]
    return 8 * sum(m.nbytes() for m in layers) / sum(m.in_features * m.out_features for m in layers)


@pytest.mark.parametrize(("bits", "target"), [(3, 4.2), (3, 5.2), (2, 4.6)])
def test_lands_within_one_percent(texts, tokenizer, target, bits):
    report, config, model = run(texts, tokenizer, bits=bits, group_size=16, target_bits=target)
    assert counted(model) == pytest.approx(report.bits_per_weight)
    assert report.bits_per_weight == pytest.approx(target, rel=0.01)
    chosen = f"target_bits={target:g}: bits={bits}, group_size=16, outlier_threshold="
    assert any(note.startswith(chosen) for note in report.notes)
    assert report.config["outlier_threshold"] == config.outlier_threshold != 0.2


@pytest.mark.parametrize(("target", "bits", "group_size"), [(3.15, 2, 16), (4.2, 3, 16), (4.85, 4, 32)])
def test_bits_and_groups_are_chosen_too(texts, tokenizer, target, bits, group_size):
    report, config, model = run(texts, tokenizer, target_bits=target)
    assert report.bits_per_weight == pytest.approx(target, rel=0.01)
    layouts = {(m.layout.bits, m.layout.group_size) for m in model.modules() if isinstance(m, SpQRLinear)}
    assert layouts == {(bits, group_size)} == {(config.bits, config.group_size)}
    assert (report.config["bits"], report.config["group_size"]) == (bits, group_size)


def test_more_bits_are_a_lower_threshold(texts, tokenizer):
    low, high = (run(texts, tokenizer, bits=3, group_size=16, target_bits=t)[1].outlier_threshold for t in (4.2, 5.0))
    assert high < low


def test_reference_mode_and_sequential(texts, tokenizer):
    fields = {
        "bits": 3,
        "group_size": 16,
        "mode": "reference",
        "percdamp": 1.0,
        "act_order": True,
        "true_sequential": True,
    }
    report, _, _ = run(texts, tokenizer, target_bits=4.8, **fields)
    assert report.bits_per_weight == pytest.approx(4.8, rel=0.01)


def test_layers_with_a_threshold_of_their_own_keep_it(texts, tokenizer):
    report, _, _ = run(
        texts, tokenizer, bits=3, group_size=16, target_bits=4.6, overrides={"q_proj": {"outlier_threshold": "inf"}}
    )
    assert all(layer.outliers == 0 for layer in report.layers if layer.name.endswith("q_proj"))
    assert report.bits_per_weight == pytest.approx(4.6, rel=0.01)


def test_a_threshold_of_its_own_may_be_the_default_one(texts, tokenizer):
    alone, _, _ = run(texts, tokenizer)
    report, _, _ = run(
        texts, tokenizer, bits=3, group_size=16, target_bits=5.0, overrides={"q_proj": {"outlier_threshold": 0.2}}
    )
    name = "model.layers.0.self_attn.q_proj"  # of the first block: its inputs are the same in both
    assert report.layer(name).outliers == alone.layer(name).outliers
    assert report.bits_per_weight == pytest.approx(5.0, rel=0.01)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_count_too(kind, texts, tokenizer):
    report, _, _ = run(texts, tokenizer, tiny_model(kind, num_hidden_layers=3), bits=4, target_bits=7.6)
    assert any(layer.experts for layer in report.layers)
    assert report.bits_per_weight == pytest.approx(7.6, rel=0.01)


@pytest.mark.parametrize("target", [3.2, 30.0])
def test_impossible_targets(texts, tokenizer, target):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="cannot be reached"):
        run(texts, tokenizer, model, bits=3, group_size=16, target_bits=target)
    assert not any(isinstance(m, SpQRLinear) for m in model.modules())


def test_every_block_is_surveyed_with_what_the_blocks_before_it_give(monkeypatch):
    model, seen = tiny_model("llama"), {}
    ids = torch.arange(3, 35).reshape(2, 16)
    inputs = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()

    def spy(name, weights, hessian, params, *, fixed):
        seen[name] = hessian
        return survey_layer(name, weights, hessian, params, fixed=fixed)

    monkeypatch.setattr(layerwise, "survey_layer", spy)
    quantize_model(model, SpQRConfig(dataset=ids.tolist(), nsamples=2, seqlen=16, target_bits=6), progress=False)
    x = inputs[0].flatten(0, 1)
    torch.testing.assert_close(seen["model.layers.1.mlp.down_proj"], 2 / 32 * x.T @ x, rtol=1e-4, atol=1e-6)


def test_histogram_counts_fall_with_the_threshold():
    torch.manual_seed(0)
    x = torch.randn(300, 64)
    scores = survey_layer("a.b", [torch.randn(32, 64)], x.T @ x, SpQRParams(), fixed=False)
    counts = [scores.count(t) for t in (1e-9, 0.01, 0.1, 1.0, 100.0, float("inf"))]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0 and counts[0] > 0.5 * 32 * 64
    assert scores.fixed_bytes == 4 * 2 * 16 * 8 + 4 * 33  # 1 vector of codes, 1 of second level, 6 of weights


def test_a_layer_without_outliers_is_no_reason_for_any_number_of_them():
    """Where there is room for a handful, a layer that took none says little about the next of its kind."""
    budget = Budget(3 + 32 * 1e-4)
    above = [10 * (BINS - i) for i in range(BINS + 1)]
    for index in range(3):
        budget.add(LayerScores(f"layers.{index}.q_proj", 40_000, 15_000, 4, above))
    budget.start()
    first = budget.threshold("layers.0.q_proj")
    assert 1 < budget.layers["layers.0.q_proj"].count(first) < 5
    budget.spend("layers.0.q_proj", outliers=0, nbytes=15_000)
    following = budget.threshold("layers.1.q_proj")
    assert following < first
    assert budget.layers["layers.1.q_proj"].count(following) < 10


def test_counts_between_two_thresholds_of_the_grid():
    scores = LayerScores("a.b", 100, 0, 4, [BINS - i for i in range(BINS + 1)])
    step = (HIGHEST - LOWEST) / BINS
    for position in (0, 1.25, 300.5, BINS):
        assert scores.count(2 ** (LOWEST + step * position)) == pytest.approx(BINS - position, abs=1e-3)
    assert scores.count(2.0 ** (LOWEST - 5)) == BINS
    assert scores.count(2.0 ** (HIGHEST + 5)) == pytest.approx(0, abs=1e-3)
