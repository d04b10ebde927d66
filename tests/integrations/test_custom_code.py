"""A model whose code, and that of its tokenizer, lies beside its weights (``trust_remote_code=True``)."""

import builtins
import shutil

import torch
from transformers import AutoModelForCausalLM

from hf_spqr import SpQRConfig
from hf_spqr.integrations.hub import complete_files
from hf_spqr.nn import SpQRLinear
from tests.custom_code import add_code, keep_modules_in
from tests.integrations.conftest import IDS


def test_quantize_save_load_without_a_question(base_folder, texts, tmp_path, monkeypatch):
    keep_modules_in(tmp_path / "modules", monkeypatch)
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *args: asked.append(args) or "n")
    custom = add_code(shutil.copytree(base_folder, tmp_path / "custom"))
    load = AutoModelForCausalLM.from_pretrained
    spqr = SpQRConfig(dataset=texts, nsamples=2, seqlen=32)
    model = load(custom, trust_remote_code=True, quantization_config=spqr)
    assert not asked
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", trust_remote_code=True)
    assert type(again).__name__ == "CustomForCausalLM"
    assert sum(isinstance(module, SpQRLinear) for module in again.modules()) == 14
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    model.quantization_report.save(tmp_path / "packed")
    assert tmp_path / "packed" / "modeling_custom.py" in complete_files(tmp_path / "packed")  # what push sends
    assert not asked
