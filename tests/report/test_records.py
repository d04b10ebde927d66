import json
import math

import pytest

from hf_spqr.errors import CheckpointError, ConfigError
from hf_spqr.report import (
    REPORT_NAME,
    BlockReport,
    CalibrationReport,
    LayerReport,
    QuantizationReport,
    library_versions,
    to_csv,
)


def make_report() -> QuantizationReport:
    layers = [
        LayerReport("model.layers.0.self_attn.q_proj", (64, 32), "spqr", 3, 16, 1024, 7, 0.05, 0.25),
        LayerReport("model.layers.0.mlp.down_proj", (32, 64), "rtn", 4, 32, 1536),
    ]
    return QuantizationReport(
        method="hf_spqr",
        config={"bits": 3, "group_size": 16},
        calibration=CalibrationReport("list of 4 texts", 4, 2048, 512),
        layers=layers,
        blocks=[BlockReport("model.layers.0", 0.5, 0.4, 0.1, 30, skipped=2, transforms=["a -> b"])],
        skipped=["lm_head"],
        notes=["threshold 0.31 chosen for 4.0 bits"],
        seconds=1.5,
    )


def test_totals_are_counted_from_bytes() -> None:
    report = make_report()
    assert report.layers[0].bits_per_weight == 4.0
    assert report.layers[0].outlier_share == 7 / 2048
    assert report.weights == 4096
    assert report.bits_per_weight == 8 * (1024 + 1536) / 4096
    assert report.outliers == 7
    assert report.mean_error == 0.05
    assert report.layer("model.layers.0.mlp.down_proj") is report.layers[1]
    assert report.layer("nothing") is None


def test_round_trip_through_a_file(tmp_path) -> None:
    report = make_report()
    path = report.save(tmp_path)
    assert path.name == REPORT_NAME == "quantization_report.json"
    assert QuantizationReport.load(tmp_path) == report
    data = json.loads(path.read_text())
    assert data["totals"]["bits_per_weight"] == report.bits_per_weight
    assert data["layers"][0]["bits_per_weight"] == 4.0


def test_a_report_of_before_there_were_blocks() -> None:
    data = make_report().to_dict()
    del data["blocks"]
    assert QuantizationReport.from_dict(data).blocks == []


def test_a_block_in_a_sentence() -> None:
    assert make_report().blocks[0].describe() == (
        "model.layers.0: squared error 0.5 rounding to nearest, 0.4 before and 0.1 after training, 1 transforms;"
        " 2 steps skipped."
    )
    bad = BlockReport("b", None, 0.4, 0.4, 30, kept_initial=True)
    assert bad.describe() == (
        "b: no finite error rounding to nearest, 0.4 before and 0.4 after training; training did not help."
    )


def test_without_layers_and_not_finite_errors_are_json(tmp_path) -> None:
    report = QuantizationReport("hf_spqr", {})
    assert math.isnan(report.bits_per_weight)
    assert math.isnan(report.mean_error)
    report.layers.append(LayerReport("a", (16, 16), "rtn", 3, 16, 128, error=math.inf))
    report.save(tmp_path)
    loaded = QuantizationReport.load(tmp_path)
    assert loaded is not None and loaded.layers[0].error is None


def test_absent_damaged_and_future_reports(tmp_path) -> None:
    assert QuantizationReport.load(tmp_path) is None
    data = make_report().to_dict()
    with pytest.raises(CheckpointError, match="report_version 99"):
        QuantizationReport.from_dict({**data, "report_version": 99})
    del data["layers"]
    with pytest.raises(CheckpointError, match="damaged"):
        QuantizationReport.from_dict(data)
    (tmp_path / REPORT_NAME).write_text("[]")
    with pytest.raises(CheckpointError, match="report_version None"):
        QuantizationReport.load(tmp_path)
    (tmp_path / REPORT_NAME).write_text("{half")
    with pytest.raises(CheckpointError, match="not JSON"):
        QuantizationReport.load(tmp_path)


def test_csv_has_one_line_per_layer() -> None:
    lines = to_csv(make_report()).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("name,method,out_features")
    assert lines[1] == "model.layers.0.self_attn.q_proj,spqr,64,32,3,16,4,7,0.05,1024,0.25"
    assert lines[2].split(",")[8] == ""


def test_versions_name_python_and_torch() -> None:
    versions = library_versions()
    assert versions["python"].count(".") == 2
    assert "torch" in versions


def test_plot(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from hf_spqr.report.plot import plot_report

    assert plot_report(make_report(), tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no quantized layers"):
        plot_report(QuantizationReport("hf_spqr", {}), tmp_path / "empty.png")
    for name in ("plot", "plot.xyz"):
        with pytest.raises(ConfigError, match=r"ends in \.png, \.svg, \.pdf"):
            plot_report(make_report(), tmp_path / name)
