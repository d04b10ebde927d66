import json
import shutil
from pathlib import Path

import pytest

from hf_spqr.integrations.transformers import quantize_model
from hf_spqr.report import QuantizationReport
from tests.architectures.matrix import METHODS
from tests.architectures.rows import ARCHITECTURES


def test_json_agrees_with_the_report(run, quantized: Path) -> None:
    data = run("inspect", quantized, "--json").json
    report = QuantizationReport.load(quantized)
    assert report is not None
    assert data["quant_method"] == "hf_spqr"
    assert data["totals"]["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    assert data["totals"]["outliers"] == report.outliers
    layers = {layer["name"]: layer for layer in data["layers"]}
    assert layers.keys() == {layer.name for layer in report.layers}
    for layer in report.layers:
        shown = layers[layer.name]
        assert tuple(shown["shape"]) == layer.shape
        assert shown["nbytes"] == layer.nbytes
        assert shown["error"] == layer.error


def test_table_csv_and_plot(run, quantized: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    csv, plot = tmp_path / "layers.csv", tmp_path / "layers.png"
    result = run("inspect", quantized, "--csv", csv, "--plot", plot)
    assert result.code == 0
    assert "model.layers.0.self_attn.q_proj" in result.out
    assert "bits per weight of the whole model" in result.out
    assert csv.read_text().count("\n") == 1 + len(QuantizationReport.load(quantized).layers)
    assert plot.stat().st_size > 1000


def test_a_model_that_is_not_quantized(run, base: Path, tmp_path: Path) -> None:
    result = run("inspect", base)
    assert result.code == 0
    assert "not quantized" in result.out
    data = run("inspect", base, "--json").json
    assert data["layers"] == [] and data["totals"]["bits_per_weight"] is None
    assert data["totals"]["model_bits_per_weight"] == 32
    failed = run("inspect", base, "--csv", tmp_path / "layers.csv")
    assert failed.code == 1 and "quantization_report.json" in failed.err


def test_a_format_of_another_program(run, base: Path, tmp_path: Path) -> None:
    """Its tensors are words of codes: their number says nothing about the number of weights."""
    folder = tmp_path / "gptq"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert run("inspect", folder, "--json").json["totals"]["model_bits_per_weight"] is None
    shown = run("inspect", folder).out
    assert "format of another program" in shown and "weights in" not in shown


def test_mistakes_are_messages(run, tmp_path: Path) -> None:
    assert "does not exist" in run("inspect", tmp_path / "absent").err
    result = run("inspect", tmp_path, "--json")
    assert result.code == 1
    assert "config.json" in result.json["error"]


def test_names_are_those_of_the_model_where_the_file_has_others(run, tmp_path: Path) -> None:
    """Transformers writes a vision-language model under the names of its first version."""
    model = next(one for one in ARCHITECTURES if one.kind == "llava").build()
    config = METHODS["SpQR"]()
    config.overrides = {r"^model\.language_model\.layers\.0": {"bits": 5}}
    report = quantize_model(model, config, progress=False)
    model.save_pretrained(tmp_path)
    for with_report in (False, True):
        if with_report:
            report.save(tmp_path)
        layers = run("inspect", tmp_path, "--json").json["layers"]
        assert {layer["name"]: layer["bits"] for layer in layers} == {one.name: one.bits for one in report.layers}
        assert all((layer["error"] is not None) == with_report for layer in layers)
