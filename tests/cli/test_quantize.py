import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_spqr
from hf_spqr.report import REPORT_NAME, QuantizationReport

FAST = ("--nsamples", "8", "--seqlen", "32")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_out_is_a_complete_folder(quantized: Path) -> None:
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", REPORT_NAME} <= names(
        quantized
    )
    AutoTokenizer.from_pretrained(quantized)
    GenerationConfig.from_pretrained(quantized)
    model = AutoModelForCausalLM.from_pretrained(quantized)
    assert model.config.quantization_config.bits == 3
    report = QuantizationReport.load(quantized)
    assert report is not None
    assert len(report.layers) == 7 * model.config.num_hidden_layers
    assert report.calibration is not None and report.calibration.description == "texts.jsonl"


def test_is_the_same_as_from_pretrained(quantized: Path, base: Path, dataset: Path) -> None:
    config = hf_spqr.SpQRConfig(dataset=str(dataset), nsamples=8, seqlen=32)
    expected = AutoModelForCausalLM.from_pretrained(base, quantization_config=config).state_dict()
    got = AutoModelForCausalLM.from_pretrained(quantized).state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_json_is_the_report(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    result = run("quantize", base, tmp_path / "q", "-d", dataset, *FAST, "--bits", 4, "--json")
    assert result.code == 0
    assert result.json["config"]["bits"] == 4
    assert result.json["totals"]["bits_per_weight"] > 4
    assert result.json["layers"][0]["bits_per_weight"] > 4


def test_a_target_chooses_and_says_so(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    result = run("quantize", base, tmp_path / "q", "-d", dataset, *FAST, "--target-bits", 7, "--json")
    assert result.code == 0
    bits, group_size = result.json["config"]["bits"], result.json["config"]["group_size"]
    assert f"--target-bits 7: bits={bits}, group_size={group_size}\n" in result.err
    assert bits > 3 and result.json["totals"]["bits_per_weight"] == pytest.approx(7, rel=0.01)
    stored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert (stored["bits"], stored["group_size"]) == (bits, group_size)
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "q").model.layers[0].mlp.up_proj
    assert (layer.layout.bits, layer.layout.group_size) == (bits, group_size)


def test_a_class_that_transformers_does_not_have(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(base, odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "model_type": "clip", "architectures": ["Something"]}))
    result = run("quantize", odd, tmp_path / "q", "-d", dataset, *FAST)
    assert result.code == 1
    assert "this Transformers has no class Something, and no language model of type clip" in result.err


def test_summary_for_people(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    result = run("quantize", base, tmp_path / "q", "-d", dataset, *FAST, "--outlier-threshold", "inf")
    assert result.code == 0
    assert "bits per weight, 0 outliers" in result.out


def test_overrides_and_skip_reach_the_layers(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    overrides = tmp_path / "overrides.json"
    overrides.write_text('{"down_proj": {"bits": 5}}')
    result = run(
        "quantize",
        base,
        tmp_path / "q",
        "-d",
        dataset,
        *FAST,
        "--skip",
        "layers.0",
        "--overrides",
        f"@{overrides}",
        "--json",
    )
    assert result.code == 0
    bits = {layer["name"]: layer["bits"] for layer in result.json["layers"]}
    assert all(".layers.0." not in name for name in bits)
    assert {name.rpartition(".")[2] for name, width in bits.items() if width == 5} == {"down_proj"}


def test_omniquant_with_overrides(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    options = (*FAST, "--method", "omniquant", "--preset", "W3A16g32", "--epochs", "0", "--json")
    mixed = ("--overrides", '{"down_proj": {"bits": 6, "group_size": -1}}')
    assert run("quantize", base, tmp_path / "q", "-d", dataset, *options, *mixed).code == 0
    for layer in run("inspect", tmp_path / "q", "--json").json["layers"]:
        expected = (6, -1) if layer["name"].endswith("down_proj") else (3, 32)
        assert (layer["bits"], layer["group_size"]) == expected
    wrong = ("--overrides", '{"down_proj": {"outlier_threshold": 1}}')
    result = run("quantize", base, tmp_path / "p", "-d", dataset, *options, *wrong)
    assert result.code == 1 and "cannot differ per layer; use bits, group_size, sym" in result.err


def test_omniquant_by_preset(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    options = (*FAST, "--method", "omniquant", "--preset", "W4A16g32", "--epochs", "1", "--json")
    result = run("quantize", base, tmp_path / "q", "-d", dataset, *options)
    assert result.code == 0
    assert result.json["config"]["quant_method"] == "omniquant"
    assert result.json["config"]["epochs"] == 1
    inspected = run("inspect", tmp_path / "q", "--json").json
    assert inspected["totals"]["bits_per_weight"] == pytest.approx(result.json["totals"]["bits_per_weight"])
    assert {layer["bits"] for layer in inspected["layers"]} == {4}


def test_omniquant_with_symmetric_activations(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    options = (*FAST, "--method", "omniquant", "--preset", "W8A8", "--sym", "--act-sym", "--epochs", "0", "--json")
    result = run("quantize", base, tmp_path / "q", "-d", dataset, *options)
    assert result.code == 0
    assert [result.json["config"][name] for name in ("act_bits", "act_sym", "sym")] == [8, True, True]


def test_refuses_a_full_folder_and_replaces_it_when_told(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "old.txt").write_text("old")
    result = run("quantize", base, out, "-d", dataset, *FAST)
    assert result.code == 1
    assert "--overwrite" in result.err
    assert names(out) == {"config.json", "old.txt"}
    assert run("quantize", base, out, "-d", dataset, *FAST, "--overwrite").code == 0
    assert "old.txt" not in names(out) and "model.safetensors" in names(out)
    assert names(tmp_path) == {"q"}


def test_never_replaces_the_folder_of_its_data(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    out.mkdir()
    (out / "config.json").write_text("{}")
    shutil.copy(dataset, out / "texts.jsonl")
    result = run("quantize", base, out, "-d", out / "texts.jsonl", *FAST, "--overwrite")
    assert result.code == 1 and "choose another output folder" in result.err
    assert names(out) == {"config.json", "texts.jsonl"}


def test_paths_with_brackets_are_shown(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "[new]" / "q"
    assert f"{out}  14 layers" in run("quantize", base, out, "-d", dataset, *FAST).out
    assert f"{out}  LlamaForCausalLM" in run("inspect", out).out
    assert "no[thing]" in run("eval", out, "-d", dataset, "--limit", 1, "--base", tmp_path / "no[thing]").err


@pytest.mark.parametrize("broken", ["weights", "interrupt"])
def test_nothing_is_left_after_a_failure(run, base: Path, dataset: Path, tmp_path: Path, monkeypatch, broken) -> None:
    from transformers import LlamaForCausalLM

    def fail(self, folder, **kwargs):
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt if broken == "interrupt" else OSError("no space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    out = tmp_path / "deep" / "q"
    result = run("quantize", base, out, "-d", dataset, *FAST, "--json")
    assert result.code != 0
    assert list((tmp_path / "deep").iterdir()) == []
    if broken == "weights":
        assert result.json["error"] == "no space left on device"


@pytest.mark.parametrize(("name", "word"), [("SIGTERM", "terminated"), ("SIGINT", "interrupted")])
@pytest.mark.parametrize("then", ["", "except BaseException: raise ImportError('halfway')"])
def test_nothing_is_left_after_a_signal(base: Path, dataset: Path, tmp_path: Path, name, word, then) -> None:
    script = f"""
        import signal, sys
        from pathlib import Path
        from transformers import LlamaForCausalLM
        from hf_spqr.cli import main

        def end(self, folder, **kwargs):
            Path(folder, "model.safetensors").write_bytes(b"half")
            try: signal.raise_signal(signal.{name})
            {then or "finally: pass"}

        LlamaForCausalLM.save_pretrained = end
        main(sys.argv[1:])
    """
    arguments = ["quantize", str(base), str(tmp_path / "q"), "-d", str(dataset), *FAST]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 128 + signal.Signals[name]
    assert done.stderr.rstrip().splitlines()[-1].endswith(word)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "9"), "bits=9"),
        (("--group-size", "24"), "group_size=24"),
        (("--outlier-threshold", "low"), "give a number, or inf"),
        (("--overrides", "{bits: 4}"), "--overrides is not JSON"),
        (("--overrides", "[]"), "must be a JSON object"),
        (("--overrides", "@absent.json"), "does not exist"),
        (("--device", "gpu"), "use cpu, cuda"),
        (("--device", "meta"), "cannot be used here"),
        (("--max-shard-size", "5"), "give a number and a unit"),
        (("--max-shard-size", "-5GB"), "give a number and a unit"),
        (("--max-shard-size", "0MB"), "give a number and a unit"),
        (("--target-bits", "5", "--outlier-threshold", "1"), "--target-bits chooses the threshold"),
        (("--target-bits", "2.01"), "target_bits=2.01 cannot be reached: without outliers the layers take"),
        (("--target-bits", "3.1", "--bits", "3"), "or leave bits out, to be chosen for it"),
        (("--preset", "W4A16"), "--preset has no meaning for --method spqr"),
        (("--act-bits", "8"), "--act-bits has no meaning for --method spqr"),
        (("--method", "omniquant", "--target-bits", "4"), "--target-bits has no meaning for --method omniquant"),
        (("--method", "omniquant", "--mode", "reference"), "needs a --preset"),
        (("--method", "omniquant", "--preset", "W99"), "W99"),
    ],
)
def test_mistakes_are_messages(run, base: Path, dataset: Path, tmp_path: Path, arguments, message) -> None:
    result = run("quantize", base, tmp_path / "q", "-d", dataset, *FAST, *arguments)
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err
    assert names(tmp_path) == set()


def test_too_little_room_is_seen_before_the_work(run, base: Path, dataset: Path, tmp_path: Path, monkeypatch) -> None:
    size = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size // 8))
    monkeypatch.setattr("hf_spqr.cli.quantize.run", lambda *arguments: pytest.fail("the run has begun"))
    result = run("quantize", base, tmp_path / "q", "-d", dataset, *FAST)
    assert result.code == 1 and "the model will take at least" in result.err
    assert names(tmp_path) == set()


def test_models_and_data_that_are_not_there(run, base: Path, quantized: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    assert "does not exist" in run("quantize", tmp_path / "absent", out, "-d", dataset).err
    assert "without config.json" in run("quantize", dataset.parent, out, "-d", dataset).err
    assert "is a file" in run("quantize", dataset, out, "-d", dataset).err
    assert "quantized already" in run("quantize", quantized, out, "-d", dataset).err
    assert "does not exist" in run("quantize", base, out, "-d", tmp_path / "absent.jsonl").err
    assert not out.exists()


def test_a_damaged_base_model(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "base"
    shutil.copytree(base, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = run("quantize", damaged, tmp_path / "q", "-d", dataset, *FAST)
    assert result.code == 1 and f"error: {damaged}: a file is truncated or damaged" in result.err
    assert names(tmp_path) == {"base"}


def test_without_a_tokenizer(run, base: Path, dataset: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    result = run("quantize", bare, tmp_path / "q", "-d", dataset, *FAST, "--json")
    assert result.code == 1
    assert "tokenizer" in json.loads(result.out)["error"]


def test_wrong_calls_exit_with_2(run, base: Path) -> None:
    assert run("quantize", base).code == 2
    assert run("quantize", base, "out", "--method", "magic", "-d", "x").code == 2
    assert run("nothing").code == 2
