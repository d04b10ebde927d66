"""Packed models that are copied, pickled, exported and used as drafts, as any model is."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from hf_spqr import OmniQuantConfig
from tests.integrations.conftest import IDS
from tests.tiny_models import byte_tokenizer

ROOT = Path(__file__).parents[2]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module", params=["spqr", "omniquant W8A8"])
def packed(request, base_folder, quantized, texts):
    if request.param == "spqr":
        return quantized
    config = OmniQuantConfig(bits=8, group_size=-1, act_bits=8, epochs=0, dataset=texts, nsamples=2, seqlen=32)
    return AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=config)


def test_a_copy_is_the_same_model_and_shares_nothing(packed):
    again = copy.deepcopy(packed)
    assert torch.equal(logits(again), logits(packed))
    theirs = {tensor.data_ptr() for tensor in packed.state_dict().values() if tensor.numel()}
    assert not theirs & {tensor.data_ptr() for tensor in again.state_dict().values()}
    assert again.hf_quantizer.quantization_config == packed.hf_quantizer.quantization_config


def test_another_process_unpickles_it_without_a_word_of_hf_spqr(packed, tmp_path):
    torch.save({"model": packed, "ids": IDS, "logits": logits(packed)}, tmp_path / "saved.pt")
    code = f"""
import torch
saved = torch.load({str(tmp_path / "saved.pt")!r}, weights_only=False)
with torch.no_grad():
    assert torch.equal(saved["model"](saved["ids"]).logits, saved["logits"])
saved["model"].save_pretrained({str(tmp_path / "again")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(packed))


def test_an_exported_program(packed, tmp_path):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = packed

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    torch.export.save(torch.export.export(Logits(), (IDS,), strict=False), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        assert torch.equal(program(IDS), packed(IDS, use_cache=False).logits)


def test_a_draft_for_its_base_model(packed, base_folder):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assisted = base.generate(IDS[:, :8], assistant_model=packed, **settings)
    assert torch.equal(assisted, base.generate(IDS[:, :8], **settings))


def test_pipeline(packed):
    write = pipeline("text-generation", model=packed, tokenizer=byte_tokenizer())
    assert write("abc", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("abc")
