import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from hf_spqr.config import SpQRConfig
from hf_spqr.errors import CheckpointError
from hf_spqr.integrations.transformers import attach
from hf_spqr.quantize import quantize_model
from hf_spqr.report import REPORT_NAME
from hf_spqr.report.checkpoint import inspect_checkpoint, read_headers, weight_files
from tests.tiny_models import tiny_model

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with one packed layer [32, 64] in two shards, and nothing else of the model but a norm."""
    quantization = {"quant_method": "hf_spqr", "bits": 3, "group_size": 16, "overrides": {"q_proj": {"bits": 4}}}
    config = LlamaConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16, vocab_size=8
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "quantization_config": quantization}))
    packed = {
        f"{NAME}.packed": torch.zeros(2, 160, dtype=torch.int32),
        f"{NAME}.outlier_row": torch.zeros(33, dtype=torch.int32),
        f"{NAME}.weight": torch.zeros(0),
    }
    rest = {f"{NAME}.outlier": torch.zeros(5, dtype=torch.int32), "model.norm.weight": torch.zeros(64)}
    save_file(packed, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_without_a_report_the_shape_comes_from_the_config(folder: Path) -> None:
    report = inspect_checkpoint(folder)
    (layer,) = report.layers
    assert (layer.name, layer.shape, layer.bits, layer.group_size) == (NAME, (32, 64), 4, 16)
    assert (layer.outliers, layer.reordered, layer.error) == (5, False, None)
    assert layer.nbytes == 4 * (320 + 33 + 5)
    assert report.bits_per_weight == 8 * layer.nbytes / 2048
    assert (report.other_weights, report.other_bytes) == (64, 256)
    assert report.file_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("field", ["bits", "format_version"])
def test_a_config_that_cannot_be_is_named(folder: Path, field: str) -> None:
    data = json.loads((folder / "config.json").read_text())
    data["quantization_config"][field] = 99
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"config.json: {field}=99"):
        inspect_checkpoint(folder)


def test_a_layer_that_the_model_does_not_have(folder: Path) -> None:
    save_file({"other.packed": torch.zeros(1, 1)}, folder / "z.safetensors")
    with pytest.raises(CheckpointError, match=f"shape of other is not known.*{REPORT_NAME}"):
        inspect_checkpoint(folder)


def index(folder: Path, data: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(data))


def test_only_what_a_load_reads_is_counted(folder: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model-00001-of-00009.safetensors").write_bytes(b"left by an earlier save")
    index(folder, {"metadata": {}, "weight_map": dict(zip("ab", names, strict=True))})
    assert [path.name for path in weight_files(folder)] == names
    assert inspect_checkpoint(folder).file_bytes == sum((folder / name).stat().st_size for name in names)
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert not inspect_checkpoint(folder).layers  # Transformers prefers it to the index


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", "is damaged"),
        ({"metadata": {}}, "is damaged.*weight_map"),
        ({"weight_map": {}}, "is damaged.*metadata"),
        ({"metadata": {}, "weight_map": {"a": "gone.safetensors"}}, "lacks gone"),
    ],
)
def test_a_damaged_index(folder: Path, data: object, message: str) -> None:
    index(folder, data)
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(folder)


@pytest.mark.parametrize("damage", ["short", "long", "header", "empty"])
def test_damaged_files_are_refused(folder: Path, damage: str) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(
        {"short": data[:-4], "long": data + b"1234", "header": data[:8] + b"{" * (len(data) - 8), "empty": b""}[damage]
    )
    with pytest.raises(CheckpointError, match=f"{path.name} is truncated or damaged"):
        inspect_checkpoint(folder)


def test_bytes_of_every_dtype(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn]
    save_file({str(dtype): torch.zeros(3, 5, dtype=dtype) for dtype in dtypes}, tmp_path / "model.safetensors")
    headers = read_headers(tmp_path / "model.safetensors")
    assert {name: info.nbytes for name, info in headers.items()} == {str(d): 15 * d.itemsize for d in dtypes}


def test_headers_have_no_metadata(folder: Path) -> None:
    headers = read_headers(folder / "model-00002-of-00002.safetensors")
    assert headers.keys() == {f"{NAME}.outlier", "model.norm.weight"}
    assert headers["model.norm.weight"].dtype == "F32"


def test_missing_files_and_damaged_configs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        inspect_checkpoint(empty)
    (empty / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="safetensors"):
        inspect_checkpoint(empty)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        inspect_checkpoint(folder)
    for text in ("[]", '{"quantization_config": "spqr"}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="should be JSON objects"):
            inspect_checkpoint(folder)


def test_a_config_of_other_weights_is_refused(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    data["quantization_config"]["overrides"] = {}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=rf"{NAME}: SpQRLayout.*\[2, 128\], the file has \[2, 160\]"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize("report", [True, False])
def test_experts_are_one_layer(tmp_path: Path, texts: list[str], tokenizer, report: bool) -> None:
    model = tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    config = SpQRConfig(dataset=texts, tokenizer=tokenizer, nsamples=8, seqlen=32)
    expected = quantize_model(model, config, progress=False)
    attach(model, config)
    model.save_pretrained(tmp_path)
    if report:
        expected.save(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert {layer.name: layer.shape for layer in found.layers} == {x.name: x.shape for x in expected.layers}
    assert {layer.experts for layer in found.layers} == {0, 4}
    assert found.bits_per_weight == pytest.approx(expected.bits_per_weight, rel=1e-6)
    assert sum(layer.outliers for layer in found.layers) == expected.outliers


def test_experts_under_the_names_of_the_original_file(tmp_path: Path, texts: list[str], tokenizer) -> None:
    """Mixtral's file says w1, w2 and w3; patterns of the config and the report say what the model does."""
    model = tiny_model("mixtral")
    overrides = {"experts.gate_proj": {"bits": 5}, "layers.1.mlp.experts.down_proj": {"bits": 2}}
    config = SpQRConfig(dataset=texts, tokenizer=tokenizer, nsamples=8, seqlen=32, overrides=overrides)
    expected = quantize_model(model, config, progress=False)
    attach(model, config)
    model.save_pretrained(tmp_path)
    without = {layer.name: layer for layer in inspect_checkpoint(tmp_path).layers}
    expected.save(tmp_path)
    found = {layer.name: layer for layer in inspect_checkpoint(tmp_path).layers}
    assert found.keys() == without.keys() == {layer.name for layer in expected.layers}
    for layer in expected.layers:
        one, other = found[layer.name], without[layer.name]
        assert (one.shape, one.bits, one.experts, one.error) == (layer.shape, layer.bits, layer.experts, layer.error)
        assert (other.shape, other.bits, other.experts, other.error) == (layer.shape, layer.bits, layer.experts, None)
