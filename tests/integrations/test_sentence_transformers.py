"""Sentence Transformers: what lies beside the weights comes along, and packed models encode texts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from hf_spqr.integrations.hub import complete_files
from hf_spqr.integrations.sentence_transformers import copy_modules
from hf_spqr.integrations.transformers import quantize_model
from hf_spqr.nn import PackedLinear
from tests.architectures.matrix import METHODS
from tests.tiny_models import byte_tokenizer

BERT = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 258}  # fmt: skip
POOLING = {"embedding_dimension": 64, "pooling_mode": "cls", "include_prompt": True}
TEXTS = ["a short one", "a text that is a good deal longer than the other one", "x"]


def fill(folder: Path) -> None:
    """A BERT with cls pooling, a dense layer and prompts."""
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("bert", **BERT)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    kinds = {"": "base.modules.transformer.Transformer", "1_Pooling": "sentence_transformer.modules.pooling.Pooling",
             "2_Dense": "base.modules.dense.Dense",
             "3_Normalize": "sentence_transformer.modules.normalize.Normalize"}  # fmt: skip
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    dense = {"in_features": 64, "out_features": 16, "bias": True,
             "activation_function": "torch.nn.modules.activation.Tanh"}  # fmt: skip
    prompts = {"prompts": {"query": "query: ", "document": ""}, "model_type": "SentenceTransformer"}
    for name, content in {
        "modules.json": modules, "1_Pooling/config.json": POOLING, "2_Dense/config.json": dense,
        "config_sentence_transformers.json": prompts, "sentence_bert_config.json": {"max_seq_length": 100},
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    weights = {"linear.weight": torch.randn(16, 64), "linear.bias": torch.randn(16)}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    (folder / "3_Normalize").mkdir()


def quantize(base: Path, out: Path) -> Path:
    model = AutoModel.from_pretrained(base)
    quantize_model(model, METHODS["SpQR"](), progress=False)
    model.save_pretrained(out)
    byte_tokenizer().from_pretrained(base).save_pretrained(out)
    copy_modules(str(base), out)
    return out


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    fill(tmp_path / "base")
    return tmp_path / "base"


def test_all_of_it_is_copied_and_published(base, tmp_path):
    out = quantize(base, tmp_path / "out")
    kept = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json",
            "2_Dense/config.json", "2_Dense/model.safetensors")  # fmt: skip
    for name in kept:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert (out / "3_Normalize").is_dir()
    (out / "checkpoint-1").mkdir()
    (out / "checkpoint-1" / "model.safetensors").write_bytes(b"of a training run")
    published = {str(path.relative_to(out)) for path in complete_files(out)}
    assert published >= {*kept, "model.safetensors"} and not any("checkpoint" in name for name in published)


def test_code_that_modules_name_comes_along_and_nothing_from_elsewhere(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "secret").mkdir()
    modules = [{"path": "", "type": "custom_st.Transformer"}, {"path": "../secret", "type": "sentence_transformers.X"}]
    (tmp_path / "base" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "base" / "custom_st.py").write_text("raise AssertionError('was run')")
    copy_modules(str(tmp_path / "base"), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"modules.json", "custom_st.py"}


def test_a_model_of_another_kind_gets_nothing(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "base" / "config_sentence_transformers.json").write_text("{}")
    copy_modules(str(tmp_path / "base"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_packed_models_encode(base, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    out = quantize(base, tmp_path / "out")
    plain, packed = package.SentenceTransformer(str(base)), package.SentenceTransformer(str(out))
    assert [type(module).__name__ for module in packed] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 12
    encoded = packed.encode(TEXTS, prompt_name="query")
    assert encoded.shape == (3, 16)
    assert (encoded * plain.encode(TEXTS, prompt_name="query")).sum(-1).min() > 0.99
    alone = [packed.encode(text, prompt_name="query") for text in TEXTS]
    assert max(abs(one - row).max() for one, row in zip(alone, encoded, strict=True)) < 1e-5
    packed.save(str(tmp_path / "again"))
    assert (package.SentenceTransformer(str(tmp_path / "again")).encode(TEXTS, prompt_name="query") == encoded).all()
