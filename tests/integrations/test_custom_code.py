"""A model whose code, and that of its tokenizer, lies beside its weights (``trust_remote_code=True``)."""

import builtins
import json
import shutil

import torch
from transformers import AutoModelForCausalLM

from hf_spqr import SpQRConfig
from hf_spqr.integrations.hub import complete_files
from hf_spqr.nn import SpQRLinear
from tests.integrations.conftest import IDS

CONFIG = """
from transformers import LlamaConfig

class CustomConfig(LlamaConfig):
    model_type = "custom_llama"
"""
MODEL = """
from transformers import LlamaForCausalLM
from .configuration_custom import CustomConfig

class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
"""

TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class CustomTokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_quantize_save_load_without_a_question(base_folder, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")

    asked = []
    monkeypatch.setattr(builtins, "input", lambda *args: asked.append(args) or "n")
    custom = tmp_path / "custom"
    shutil.copytree(base_folder, custom)
    (custom / "configuration_custom.py").write_text(CONFIG)
    (custom / "modeling_custom.py").write_text(MODEL)
    (custom / "tokenization_custom.py").write_text(TOKENIZER)
    tokenizer = json.loads((custom / "tokenizer_config.json").read_text()) | {
        "tokenizer_class": "CustomTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_custom.CustomTokenizer"]},
    }
    (custom / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = json.loads((custom / "config.json").read_text()) | {
        "model_type": "custom_llama",
        "architectures": ["CustomForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_custom.CustomConfig",
            "AutoModelForCausalLM": "modeling_custom.CustomForCausalLM",
        },
    }
    (custom / "config.json").write_text(json.dumps(config))
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
