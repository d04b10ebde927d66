"""The tokenizer beside a model: loaded for text only, and named where that fails."""

import pytest
import torch
from transformers import AutoTokenizer

from hf_spqr import CalibrationError, SpQRConfig, quantize_model
from hf_spqr.quantize.tokenizer import find_tokenizer, tokenizer_beside
from tests.tiny_models import byte_tokenizer, tiny_model


@pytest.fixture
def without(monkeypatch):
    """Transformers without a package that the tokenizer of a model needs."""

    def fail(*args, **kwargs):
        raise ImportError("You need to install sacremoses")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)


@pytest.fixture
def model(tmp_path):
    model = tiny_model("llama")
    model.name_or_path = str(tmp_path)
    return model


def test_token_ids_need_no_tokenizer(without, model):
    config = SpQRConfig(bits=4, dataset=torch.randint(1, 250, (2, 32)), nsamples=2, seqlen=32)
    assert len(quantize_model(model, config, progress=False).layers) == 14


def test_text_says_what_is_wrong_with_the_tokenizer(without, model, texts):
    config = SpQRConfig(bits=4, dataset=texts, nsamples=2, seqlen=32)
    with pytest.raises(CalibrationError, match=r"dataset holds text: pass tokenizer=.*install sacremoses"):
        quantize_model(model, config, progress=False)


def test_one_that_is_named_and_not_there(tmp_path, model, texts):
    config = SpQRConfig(bits=4, dataset=texts, tokenizer=str(tmp_path / "nowhere"), nsamples=2, seqlen=32)
    with pytest.raises(CalibrationError, match=r"nowhere' is no tokenizer, nor the name of one"):
        quantize_model(model, config, progress=False)


def test_it_is_loaded_once_and_behaves_as_the_one_it_stands_for(model, monkeypatch):
    calls = []
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *args, **kwargs: calls.append(args) or byte_tokenizer()
    )
    waiting = find_tokenizer(model)
    assert not calls
    assert waiting("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"] and waiting.eos_token_id == 257
    assert calls == [(model.name_or_path,)]
    given = byte_tokenizer()
    assert find_tokenizer(model, given) is given and len(calls) == 1


@pytest.mark.parametrize("error", [OSError, ValueError, TypeError])
def test_a_folder_without_a_tokenizer_has_none(error, model, monkeypatch):
    def fail(*args, **kwargs):
        raise error("no vocabulary")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    assert tokenizer_beside(model) is None
