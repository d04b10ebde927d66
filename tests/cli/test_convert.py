"""Official SpQR checkpoints in and out by command."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def official(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hf_spqr.cli import main

    out = tmp_path_factory.mktemp("export") / "official"
    with pytest.raises(SystemExit) as stop:
        main(["export", str(quantized), str(out), "--format", "spqr", "--json"])
    assert not stop.value.code
    return out


def test_export_writes_the_official_layout(official: Path) -> None:
    config = json.loads((official / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "spqr" and config["dtype"] == "float16"
    stored = load_file(official / "model.safetensors")
    for name, count in config["quantization_config"]["shapes"].items():
        assert stored[name.removesuffix(".shape")].numel() == count
    assert (official / "tokenizer.json").is_file()


def test_convert_brings_it_back(run, official: Path, quantized: Path, tmp_path: Path) -> None:
    result = run("convert", official, tmp_path / "back", "--json")
    assert result.code == 0, result.err
    before, after = (
        json.loads(run("inspect", path, "--json").out)["totals"] for path in (quantized, tmp_path / "back")
    )
    for key in ("layers", "weights", "nbytes", "bits_per_weight", "outliers"):
        assert before[key] == after[key], key
    assert result.json["totals"]["nbytes"] == before["nbytes"]
    assert not any("repaired" in note for note in result.json["notes"])


def test_mistakes_are_messages(run, official: Path, quantized: Path, base: Path, tmp_path: Path) -> None:
    for arguments, message in [
        (("convert", base, tmp_path / "x"), "it is not quantized"),
        (("convert", quantized, tmp_path / "x"), "is in our format already: it loads as it is"),
        (("convert", official, official), "or contains, the input"),
        (("convert", base, tmp_path / "x", "--omniquant", "a.pth"), "needs --bits"),
        (("convert", quantized, tmp_path / "x", "--omniquant", "a.pth", "--bits", 4), "needs the base model"),
        (("convert", base, tmp_path / "x", "--omniquant", tmp_path / "a.pth", "--bits", 4), "does not exist"),
        (("convert", base, tmp_path / "x", "--bits", 4, "--group-size", 32), "have no qweight of any layer"),
        (("convert", official, tmp_path / "x", "--bits", 4), "leave out --bits and --group-size"),
        (("convert", official, tmp_path / "x", "--act-bits", 4), "--act-bits goes with --omniquant only"),
        (("export", base, tmp_path / "x", "--format", "spqr"), "is not quantized"),
        (("export", quantized, tmp_path / "x", "--format", "gptq_v2"), "affine models only"),
    ]:
        result = run(*arguments)
        assert result.code == 1, arguments
        assert message in " ".join(result.err.split()), result.err
    assert not (tmp_path / "x").exists()


def test_gptq_and_omniquant_files(run, base: Path, tmp_path: Path) -> None:
    layer = AutoModelForCausalLM.from_pretrained(base).model.layers[0]
    groups = {name: m.weight.numel() // 32 for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    factors = {
        f"{name}.weight_quantizer.{side}_factor": torch.full((count, 1), 4.0)
        for name, count in groups.items()
        for side in ("upbound", "lowbound")
    }
    blocks = {0: factors, 1: factors}
    torch.save(blocks, tmp_path / "w4g32.pth")
    arguments = ("--omniquant", tmp_path / "w4g32.pth", "--bits", 4, "--group-size", 32, "--json")
    result = run("convert", base, tmp_path / "omni", *arguments)
    assert result.code == 0, result.err
    assert result.json["totals"]["layers"] == 14
    result = run("export", tmp_path / "omni", tmp_path / "gptq", "--format", "gptq_v2")
    assert result.code == 0, result.err
    result = run("convert", tmp_path / "gptq", tmp_path / "back", "--json")
    assert result.code == 0, result.err
    ours, back = (load_file(tmp_path / folder / "model.safetensors") for folder in ("omni", "back"))
    assert ours.keys() == back.keys() and all(torch.equal(ours[key], back[key]) for key in ours)


@pytest.mark.shared
def test_the_fixture_is_repaired(run, shared_dir: Path, tmp_path: Path) -> None:
    result = run("convert", shared_dir / "fixtures" / "official_spqr" / "tiny_hub", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert any("repaired" in note for note in result.json["notes"])
    assert any("no tokenizer" in note for note in result.json["notes"])
    totals = result.json["totals"]
    assert totals["layers"] == 14 and totals["outliers"] == 4913
