"""The model card says what the report says, and its metadata is what the Hub reads."""

import pytest
from huggingface_hub import ModelCard

from hf_spqr.errors import ConfigError
from hf_spqr.report.card import hub_name, model_card
from hf_spqr.report.checkpoint import CheckpointReport
from tests.report.test_records import make_report

EVALUATION = {
    "dataset": "/home/me/heldout.jsonl",
    "dtype": "float32",
    "perplexity": 5.2,
    "protocol_text": "Per-document perplexity",
    "base": {"perplexity": 5.0},
}


def test_card_of_an_spqr_model() -> None:
    report = make_report()
    report.base_model = "meta/base"
    checkpoint = CheckpointReport(
        "x", "LlamaForCausalLM", "hf_spqr", other_weights=100, other_bytes=200, file_bytes=999
    )
    text = model_card(
        report, "me/tiny-SpQR", checkpoint=checkpoint, license="mit", tags=["demo", "quantized"],
        evaluation=EVALUATION, plot="quantization_error.png",
    )  # fmt: skip
    card = ModelCard(text)
    assert card.data.base_model == "meta/base" and card.data.license == "mit"
    assert card.data.base_model_relation == "quantized" and card.data.library_name == "transformers"
    assert card.data.tags == ["hf-spqr", "spqr", "quantized", "3-bit", "demo"]
    for part in (
        "# tiny-SpQR", "import hf_spqr", 'from_pretrained("me/tiny-SpQR")', "arxiv.org/abs/2306.03078",
        "counted from bytes | **5.000** |", "list of 4 texts: 4 sequences, 2,048 tokens", "0.0500", "999 bytes",
        "| before quantization | 5.0000 |", "| this model | 5.2000 |", "heldout.jsonl", "(quantization_error.png)",
        "threshold 0.31 chosen", "lm_head", '"group_size": 16', report.hardware,
    ):  # fmt: skip
        assert part in text, part
    assert "/home/me" not in text and "stored otherwise" not in text
    assert "{{" not in text and "{%" not in text and "\n\n\n" not in text


def test_card_of_a_model_about_which_little_is_known() -> None:
    report = make_report()
    report.method, report.calibration, report.versions, report.notes, report.seconds = "omniquant", None, {}, [], 0.0
    report.config = {"bits": 4, "group_size": -1, "act_bits": 4}
    report.base_model = "/home/me/model"
    text = model_card(report, "me/x")
    assert "4-bit weights, one scale per output channel, 4-bit activations per token." in text
    report.config["overrides"] = {"down_proj": {"bits": 8}}
    assert "per token. Some layers are stored otherwise: see `overrides`" in model_card(report, "me/x")
    assert "base_model" not in ModelCard(text).data.to_dict() and "/home/me" not in text
    assert "perplexity" not in text and "Calibration" not in text and "Versions" not in text


def test_card_of_a_model_with_code_of_its_own() -> None:
    text = model_card(make_report(), "me/x", loader="AutoModel", task=None, own_code=True)
    assert 'model = AutoModel.from_pretrained("me/x", trust_remote_code=True)' in text
    assert "pipeline_tag" not in ModelCard(text).data.to_dict()


def test_one_group_per_row_in_words() -> None:
    report = make_report()
    assert "3-bit codes in groups of\n16, quantized statistics" in model_card(report, "me/x")
    report.config["group_size"] = -1
    assert "3-bit codes, one group per output channel, quantized statistics" in model_card(report, "me/x")


def test_an_evaluation_must_be_one() -> None:
    with pytest.raises(ConfigError, match="hf-spqr eval --json"):
        model_card(make_report(), "me/x", evaluation={"acc": 1})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("me/model-1.0", "me/model-1.0"), ("./me/x", None), ("/a/b", None), ("x", None), (None, None)],
)
def test_hub_names(name, expected) -> None:
    assert hub_name(name) == expected
