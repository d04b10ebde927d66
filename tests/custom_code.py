"""Makes a model folder one whose Python code, that of its tokenizer and of its processor lie beside the weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

FILES = {
    "configuration_custom.py": """
from transformers import LlamaConfig

class CustomConfig(LlamaConfig):
    model_type = "custom_llama"
""",
    "modeling_custom.py": """
from transformers import LlamaForCausalLM
from .configuration_custom import CustomConfig

class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
""",
    "tokenization_custom.py": """
from transformers import PreTrainedTokenizerFast

class CustomTokenizer(PreTrainedTokenizerFast):
    pass
""",
    "processing_custom.py": """
from .pictures import size

class CustomProcessor:
    pass
""",
    "pictures.py": "size = 1\n",
}


def add_code(folder: Path) -> Path:
    """Give the Llama in ``folder``, with its tokenizer, a class of its own; returns the folder."""
    for name, code in FILES.items():
        (folder / name).write_text(code)
    places = {
        "AutoConfig": "configuration_custom.CustomConfig",
        "AutoModelForCausalLM": "modeling_custom.CustomForCausalLM",
    }
    _update(folder / "config.json", model_type="custom_llama", architectures=["CustomForCausalLM"], auto_map=places)
    tokenizer = {"AutoTokenizer": [None, "tokenization_custom.CustomTokenizer"]}
    _update(folder / "tokenizer_config.json", tokenizer_class="CustomTokenizer", auto_map=tokenizer)
    (folder / "processor_config.json").write_text("{}")
    _update(folder / "processor_config.json", auto_map={"AutoProcessor": "processing_custom.CustomProcessor"})
    return folder


def keep_modules_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Transformers copy the code that it runs to ``folder``, not to the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


def _update(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
