"""The Fisher information says how far a small error makes the model's distribution diverge."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_spqr.calibration.blocks import find_blocks
from hf_spqr.calibration.fisher import FisherSum, gradient_at_the_end, through_block
from hf_spqr.errors import UnsupportedLayerError
from tests.tiny_models import tiny_model

IDS = torch.arange(3, 67).reshape(2, 32)


def through_the_model(model, blocks):
    """Outputs of the blocks and logits of a plain pass, with a graph."""
    outputs = []
    hooks = [
        b.module.register_forward_hook(lambda m, a, o: outputs.append(o[0] if isinstance(o, tuple) else o))
        for b in blocks
    ]
    logits = model(IDS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return outputs, logits


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "cohere2"])
def test_gradient_at_the_end_is_that_of_the_whole_model(kind):
    model = tiny_model(kind)
    blocks = find_blocks(model)
    outputs, logits = through_the_model(model, blocks)
    probabilities = logits.float().softmax(-1).detach().flatten(0, 1)
    drawn = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(5)).view(2, 32, 1)
    likelihood = logits.float().log_softmax(-1).gather(-1, drawn).sum()
    (expected,) = torch.autograd.grad(likelihood, outputs[-1])
    with torch.no_grad():  # as quantize_model may be called
        got = gradient_at_the_end(model, blocks, IDS, outputs[-1], seed=5)
        other = gradient_at_the_end(model, blocks, IDS, outputs[-1], seed=6)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(other, expected, rtol=1e-2, atol=1e-3)
    assert not any("forward" in block.module.__dict__ for block in blocks)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_goes_through_a_block():
    torch.manual_seed(0)
    layer, x, gradient = nn.Linear(8, 6), torch.randn(3, 8), torch.randn(3, 6)
    torch.testing.assert_close(through_block(layer, x, gradient), gradient @ layer.weight)
    assert layer.weight.grad is None


def test_divergence_is_half_the_quadratic_form():
    torch.manual_seed(0)
    model = tiny_model("llama")
    model.lm_head.weight.data.mul_(8)  # an even distribution is not put to the test
    blocks = find_blocks(model)
    hidden = torch.randn(1, 32, 64)
    sums = FisherSum(64)
    for seed in range(400):
        sums.add(gradient_at_the_end(model, blocks, IDS[:1], hidden, seed))
    fisher = sums.moments / sums.tokens
    end = nn.Sequential(model.model.norm, model.lm_head)
    ratios = []
    with torch.no_grad():
        before = end(hidden).log_softmax(-1)
        for direction in torch.linalg.eigh(fisher.double()).eigenvectors.float().T[[63, 56, 40]]:
            error = 1e-2 * direction
            after = end(hidden + error).log_softmax(-1)
            divergence = (before.double().exp() * (before.double() - after.double())).sum(-1).mean()
            ratios.append(float(divergence) / float(error @ fisher @ error / 2))
    assert all(0.9 < ratio < 1.1 for ratio in ratios), ratios


def test_few_gradients_are_mixed_with_the_identity_and_many_are_not():
    torch.manual_seed(0)
    spread = torch.logspace(-1, 1, 24)
    rotation = torch.linalg.qr(torch.randn(24, 24)).Q
    truth = (rotation * spread) @ rotation.T
    truth /= truth.diagonal().mean()
    errors = []
    for tokens in (8, 100, 20000):
        sums = FisherSum(24)
        for rows in (torch.randn(tokens, 24) * spread.sqrt() @ rotation.T * 1e-3).split(50):
            sums.add(rows[None])
        found = sums.information()
        plain = sums.moments / sums.moments.diagonal().mean()
        assert float(found.diagonal().mean()) == pytest.approx(1, rel=1e-5)
        assert float(torch.linalg.eigvalsh(found).min()) > 0
        errors.append([float((x - truth).norm() / truth.norm()) for x in (found, plain)])
    (few, few_plain), (some, some_plain), (many, many_plain) = errors
    assert few < 0.8 * few_plain and some < some_plain and many < 0.06
    assert many == pytest.approx(many_plain, rel=0.1)


def test_gradients_that_are_not_finite_are_left_out():
    sums = FisherSum(4)
    assert sums.information() is None
    sums.add(torch.tensor([[1.0, float("nan"), 0, 0]]))
    sums.add(torch.full((2, 4), 1e30))
    assert sums.information() is None
    sums.add(torch.ones(3, 4))
    assert sums.tokens == 3 and sums.information() is not None


@pytest.mark.parametrize("logits", [None, torch.zeros(1, 32, 5), torch.zeros(1, 5)])
def test_a_model_without_logits_for_each_token_is_refused(logits):
    model = tiny_model("llama")
    model.forward = lambda input_ids, use_cache: SimpleNamespace(logits=logits)
    with pytest.raises(UnsupportedLayerError, match="no logits for each token"):
        gradient_at_the_end(model, find_blocks(model), IDS[:1], torch.zeros(1, 32, 64))
