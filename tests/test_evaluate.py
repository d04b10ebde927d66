import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_spqr.errors import CalibrationError, ConfigError, NonFiniteError
from hf_spqr.evaluate import PROTOCOLS, perplexity


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def documents(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def nll_alone(model, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens])
    return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")


@pytest.mark.parametrize("token", [-1, 32])
def test_tokens_of_another_model(model, token: int) -> None:
    with pytest.raises(CalibrationError, match="the model has 32 embeddings"):
        perplexity(model, None, [[1, 2, token]])


def test_a_model_that_gives_nan(model) -> None:
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(NonFiniteError, match="no perplexity"):
        perplexity(broken, None, [[1, 2, 3]])


def test_per_document_equals_each_document_alone(model) -> None:
    texts = documents([20, 5, 33, 1, 12])
    alone = [nll_alone(model, tokens) for tokens in texts if len(tokens) > 1]
    result = perplexity(model, None, texts, batch_size=3)
    assert result.tokens == 19 + 4 + 32 + 11
    assert result.documents == 4
    assert result.nll == pytest.approx(torch.cat(alone).mean().item(), rel=1e-5)
    assert result.nll_documents == pytest.approx(sum(x.mean().item() for x in alone) / 4, rel=1e-5)
    assert result.perplexity == math.exp(result.nll)
    assert "per document, 4 documents" in result.describe()


def test_per_document_says_what_it_cut(model) -> None:
    result = perplexity(model, None, documents([20, 10]), seqlen=16)
    assert result.truncated == 1
    assert result.tokens == 15 + 9
    assert "1 cut at 16 tokens" in result.describe()


def test_concatenated_drops_the_rest(model) -> None:
    texts = documents([30, 25])
    stream = texts[0] + texts[1]
    result = perplexity(model, None, texts, protocol="concatenated", seqlen=16)
    alone = [nll_alone(model, stream[i : i + 16]) for i in (0, 16, 32)]
    assert result.tokens == 45
    assert result.nll == pytest.approx(torch.cat(alone).mean().item(), rel=1e-5)
    assert result.nll_documents is None and result.perplexity_documents is None


@pytest.mark.parametrize(("length", "stride"), [(40, 4), (41, 8), (16, 8), (17, 16), (10, 8)])
def test_sliding_window_scores_every_token_once(model, length: int, stride: int) -> None:
    (stream,) = documents([length])
    result = perplexity(model, None, [stream], protocol="sliding-window", seqlen=16, stride=stride)
    assert result.tokens == length - 1 - (length == 17 and stride == 16)  # a lone last token has no context
    expected, scored = [], 1
    for begin in range(0, length, stride):
        end = min(begin + 16, length)
        if end > max(scored, begin + 1):
            expected.append(nll_alone(model, stream[begin:end])[max(scored - begin, 1) - 1 :])
            scored = end
        if end == length:
            break
    assert result.nll == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)


def test_progress_and_mode_are_restored(model) -> None:
    calls = []
    model.train()
    perplexity(model, None, documents([5] * 5), batch_size=2, on_progress=lambda *c: calls.append(c))
    assert model.training
    model.eval()
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_texts_go_through_the_tokenizer(model) -> None:
    class Bytes:
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [0] + [byte % 32 for byte in text.encode()]}

    result = perplexity(model, Bytes(), ["hello world", "abc"])
    assert result.tokens == 14  # all but the first, which is the tokenizer's BOS
    joined = perplexity(model, Bytes(), ["hello world", "abc"], protocol="sliding-window")
    assert joined.tokens == 16  # one BOS, and the blank line between the texts


def test_user_errors_say_what_to_do(model) -> None:
    texts = documents([8])
    with pytest.raises(ConfigError, match="use one of per-document"):
        perplexity(model, None, texts, protocol="windows")
    with pytest.raises(ConfigError, match="stride has no meaning"):
        perplexity(model, None, texts, stride=4)
    with pytest.raises(ConfigError, match="stride=99"):
        perplexity(model, None, texts, protocol="sliding-window", stride=99)
    with pytest.raises(ConfigError, match="seqlen=1"):
        perplexity(model, None, texts, seqlen=1)
    with pytest.raises(ConfigError, match="batch_size=0"):
        perplexity(model, None, texts, batch_size=0)
    with pytest.raises(ConfigError, match="tokenizer is None"):
        perplexity(model, None, ["text"])
    for protocol in PROTOCOLS:
        with pytest.raises(CalibrationError, match="nothing to score"):
            perplexity(model, None, [[3]], protocol=protocol)
