"""The demo model and its texts are what the examples and the other tests take them for."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_spqr.evaluate import perplexity
from hf_spqr.methods import rtn
from hf_spqr.methods.base import AffineParams

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = EXAMPLES / "demo-model"


def texts(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


def test_is_small_and_complete() -> None:
    names = {path.name for path in MODEL.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in EXAMPLES.rglob("*") if path.is_file()) < 8_000_000
    config = AutoModelForCausalLM.from_pretrained(MODEL).config
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.dtype == torch.bfloat16


def test_tokenizer_adds_bos_and_keeps_every_byte() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "def f(x):\n\treturn 'ä€' # 🙂\r\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_calibration_and_held_out_texts_are_apart() -> None:
    held_out, calibration = texts("demo-heldout.jsonl"), texts("demo-calibration.jsonl")
    assert 200_000 < sum(map(len, held_out)) < 400_000
    assert 200_000 < sum(map(len, calibration)) < 500_000
    assert not set(held_out) & set(calibration)
    assert max(map(len, held_out)) <= 1500


@pytest.mark.parametrize(("bits", "low", "high"), [(8, 0.995, 1.005), (3, 1.02, 2.0)])
def test_three_bits_rounded_to_nearest_visibly_hurt(bits: int, low: float, high: float) -> None:
    held_out = texts("demo-heldout.jsonl")[:24]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    before = perplexity(model, tokenizer, held_out).perplexity
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            result = rtn.quantize(module.weight.detach().float(), AffineParams(bits=bits, group_size=128))
            module.weight.data.copy_(result.weight.dequantize())
    after = perplexity(model, tokenizer, held_out).perplexity
    assert low < after / before < high
