"""Where people run models: pipelines, batches with padding, assisted decoding, caches, exported graphs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from hf_spqr.integrations.transformers import quantize_model
from tests.architectures.matrix import METHODS
from tests.tiny_models import byte_tokenizer, tiny_model

PROMPTS = ["The quick", "A much longer prompt than the other one", "x"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=METHODS)
def folder(request, tmp_path_factory):
    """A packed model with its tokenizer."""
    path = tmp_path_factory.mktemp("packed")
    model = tiny_model("llama")
    quantize_model(model, METHODS[request.param](), progress=False)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def plain(folder):
    """The same model with ordinary layers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.dequantize()
    return model


@pytest.fixture
def padding_tokenizer(tokenizer):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
    return tokenizer


def test_pipeline_by_name_of_the_folder(folder):
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    first = generate(PROMPTS[0], **GREEDY)[0]["generated_text"]
    assert first.startswith(PROMPTS[0])
    batch = generate(PROMPTS, batch_size=1, **GREEDY)
    assert batch[0][0]["generated_text"] == first


def test_batches_with_padding(model, plain, padding_tokenizer):
    batch = padding_tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert batch["attention_mask"].min() == 0
    together = model.generate(**batch, **GREEDY)
    assert torch.equal(together, plain.generate(**batch, **GREEDY))
    with torch.no_grad():
        mask = batch["attention_mask"].bool()
        logits = model(**batch).logits[1]
        alone = model(padding_tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]).logits[0]
    torch.testing.assert_close(logits[mask[1]], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"use_cache": False}])
def test_ways_of_generating(model, plain, options):
    ids = torch.arange(3, 13)[None]
    results = []
    for one in (model, plain):
        torch.manual_seed(0)
        results.append(one.generate(ids, **{**GREEDY, **options}))
    assert torch.equal(*results)


def test_assisted_decoding(model, plain):
    ids = torch.arange(3, 13)[None]
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=plain, **GREEDY), expected)
    assert torch.equal(plain.generate(ids, assistant_model=model, **GREEDY), plain.generate(ids, **GREEDY))
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_caches(model, cache):
    ids = torch.arange(3, 13)[None]
    expected = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, cache_implementation=cache, **GREEDY), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_export(kind):
    model = tiny_model(kind)
    quantize_model(model, METHODS["SpQR"](), progress=False)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids, use_cache=False).logits

    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        exported = torch.export.export(Logits(), (ids,))
        ops = {str(node.target) for node in exported.graph.nodes}
        assert "hf_spqr.spqr_linear.default" in ops
        assert kind == "llama" or "hf_spqr.spqr_grouped_linear.default" in ops
        torch.testing.assert_close(exported.module()(ids), Logits()(ids))


def test_compiled_decoding_step(model):
    """One graph for any step of decoding with a static cache."""
    ids = torch.arange(3, 13)[None]
    expected = model.generate(ids, **GREEDY)
    eager = model.forward
    model.forward = torch.compile(eager, backend="aot_eager", fullgraph=True)
    try:
        assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), expected)
    finally:
        model.forward = eager
