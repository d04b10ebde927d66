"""Models with other heads than that of a language model: what is packed, what a class loads, what can be trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from hf_spqr.errors import CheckpointError
from hf_spqr.integrations.transformers import quantize_model
from hf_spqr.integrations.verify import check_folder
from hf_spqr.nn import PackedLinear
from tests.architectures.matrix import METHODS
from tests.architectures.rows import BART, BERT, T5, TEXT

SIZES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "albert": {**BERT, "embedding_size": 32},
    "qwen3": TEXT,
    "bart": {**BART, "encoder_layers": 1, "decoder_layers": 1},
    "umt5": {**T5, "num_layers": 1},
    "longformer": {
        **BERT,
        "num_hidden_layers": 1,
        "attention_window": 8,
        "max_position_embeddings": 130,
        "pad_token_id": 1,
    },
    "clip": {
        "text_config": {**BERT, "eos_token_id": 257},
        "vision_config": {**BERT, "image_size": 32, "patch_size": 16},
        "projection_dim": 32,
    },
}
IDS = torch.arange(3, 43).view(2, 20)
IDS[:, -1] = 257  # BART's classifier looks at the last token that ends a text


def build(cls: str, kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, cls)(AutoConfig.for_model(kind, **SIZES[kind])).eval()


def packed(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@torch.no_grad()
def outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    return [value for value in model(input_ids=IDS).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    ("method", "kind", "cls", "count", "left"),
    [
        ("SpQR", "bert", "BertForSequenceClassification", 12, ["bert.pooler.dense", "classifier"]),
        ("OmniQuant", "bert", "BertForTokenClassification", 12, ["classifier"]),
        ("SpQR", "bert", "BertForQuestionAnswering", 12, ["qa_outputs"]),
        ("OmniQuant", "qwen3", "Qwen3ForSequenceClassification", 14, ["score"]),
        (
            "SpQR",
            "bart",
            "BartForSequenceClassification",
            16,
            [f"classification_head.{n}" for n in ("dense", "out_proj")],
        ),
        (
            "OmniQuant",
            "umt5",
            "UMT5EncoderModel",
            6,
            ["encoder.block.0.layer.1.DenseReluDense.wo"],
        ),
        ("SpQR", "longformer", "LongformerForSequenceClassification", 9, ["classifier.dense", "classifier.out_proj"]),
    ],
)
def test_the_head_is_left_and_all_comes_back(method, kind, cls, count, left, tmp_path):
    model = build(cls, kind)
    before = outputs(model)
    report = quantize_model(model, METHODS[method](), progress=False)
    assert len(packed(model)) == len(report.layers) == count and report.skipped == left
    after = outputs(model)
    assert all(0 < (a - b).norm() < 0.2 * b.norm() for a, b in zip(after, before, strict=True))
    model.save_pretrained(tmp_path)
    again = getattr(transformers, cls).from_pretrained(tmp_path)
    assert all(map(torch.equal, outputs(again), after))


@pytest.mark.parametrize(
    ("kind", "saved", "loaded", "count"),
    [
        ("bert", "BertForMaskedLM", "BertForSequenceClassification", 12),
        ("albert", "AlbertForSequenceClassification", "AlbertForMaskedLM", 6),
        ("qwen3", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification", 14),
        ("bart", "BartForConditionalGeneration", "BartForCausalLM", 10),
        ("umt5", "UMT5ForConditionalGeneration", "UMT5EncoderModel", 6),
    ],
)
def test_another_class_loads_what_it_has_in_common(kind, saved, loaded, count, tmp_path):
    """And what the file lacks is made anew, with the report of Transformers, as of the unquantized checkpoint."""
    model, load = build(saved, kind), getattr(transformers, loaded).from_pretrained
    model.save_pretrained(tmp_path / "base")
    quantize_model(model, METHODS["SpQR"](), progress=False)
    model.save_pretrained(tmp_path / "quantized")
    expected = load(tmp_path / "base", output_loading_info=True)[1]
    other, info = load(tmp_path / "quantized", output_loading_info=True)
    assert len(packed(other)) == count and info["missing_keys"] == expected["missing_keys"]
    assert {name for name in info["unexpected_keys"] if not name.endswith(("packed", "outlier", "outlier_row"))} == {
        name for name in expected["unexpected_keys"]
    }


def test_a_class_that_lacks_a_part_of_the_files_is_not_published(tmp_path):
    """A load leaves out what the class does not have; who publishes has named the wrong class in config.json."""
    model = build("BartForConditionalGeneration", "bart")
    quantize_model(model, METHODS["SpQR"](), progress=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("BartForConditionalGeneration", "BartForCausalLM"))
    with pytest.raises(CheckpointError, match=r"names BartForCausalLM, which has no 'model.encoder"):
        check_folder(tmp_path, [tmp_path / "model.safetensors"])


def test_files_of_another_model_are_still_refused(tmp_path):
    model = build("BertModel", "bert")
    quantize_model(model, METHODS["SpQR"](), progress=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="belong to no packed linear layer of Qwen3Model"):
        other = AutoConfig.for_model("qwen3", quantization_config=model.config.quantization_config.to_dict(), **TEXT)
        AutoModel.from_pretrained(tmp_path, config=other)


def test_the_text_part_of_clip():
    model = build("CLIPModel", "clip")
    before = model.vision_model.state_dict()
    report = quantize_model(model, METHODS["SpQR"](), progress=False)
    names = [layer.name for layer in report.layers]
    assert len(names) == 12 and all(name.startswith("text_model.encoder.layers.") for name in names)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.vision_model.state_dict().items())
    assert all(layer.error is not None and layer.error < 0.2 for layer in report.layers)


@pytest.mark.parametrize(
    ("kind", "cls", "head"), [("bert", "BertModel", "classifier"), ("qwen3", "Qwen3Model", "score")]
)
def test_a_new_head_is_trained(kind, cls, head, tmp_path):
    model = build(cls, kind)
    quantize_model(model, METHODS["SpQR"](), progress=False)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    layer = getattr(model, head)
    assert type(layer) is nn.Linear and layer.weight.requires_grad and layer.out_features == 5
    assert 0.01 < layer.weight.std() < 0.03  # Transformers' own initialization
    labels = torch.tensor([1, 4])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "trained")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert again.config.num_labels == 5 and torch.equal(outputs(again)[0], outputs(model.eval())[0])
