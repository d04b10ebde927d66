"""What users get wrong most often: each mistake is one line that says what is wrong and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

MISTAKES = {
    "quantize {base} {out} -d {empty}": "less than two tokens",
    "quantize {base} {out} -d {columns}": "several texts (body, id): call the field that holds the text 'text'",
    "quantize {base} {out} -d {binary}": "cannot be read as txt",
    "quantize {base} {out} -d {base}": "is a folder: give one of its files",
    "quantize {bare} {out} -d {data}": "has no tokenizer: copy tokenizer.json",
    "quantize {broken} {out} -d {data}": "its config.json cannot be read",
    "quantize no-such-model {out} -d {data}": "no-such-model is no folder here, and on the Hub it cannot be read",
    "quantize {base} {out} -d {data} --bits -3": "bits=-3: use a whole number from 2 to 8",
    "quantize {base} {out} -d {data} --group-size 17": "group_size=17: use one of",
    "quantize {base} {out} -d {data} --nsamples -1": "nsamples=-1: use a whole number of at least 1",
    "quantize {base} {out} -d {data} --outlier-threshold nan": "outlier_threshold=nan: use a number above 0",
    "quantize {base} {out} -d {data} --target-bits 1": "target_bits=1.0: use a number above 2",
    "quantize {base} {out} -d {data} --method omniquant --preset W3A16q128": "use W<bits>A<bits>[g<group size>]",
    "quantize {base} {out} -d {data} --method omniquant --batch-size 0": "batch_size=0: use a whole number",
    "quantize {base} {out} -d {data} --skip (": "'(' is not a valid regular expression",
    "quantize {base} {out} -d {data} --overrides @{data}": "--overrides is not JSON",
    "quantize {quantized} {out} -d {data}": "is quantized already (hf_spqr); give the model that it was made from",
    "eval {quantized} -d no-such.txt": "The data file no-such.txt does not exist",
    "eval {quantized} -d {empty}": "nothing to score: the text gives no window",
    "eval {quantized} -d {data} --stride 4": "stride has no meaning for protocol 'per-document'",
    "inspect {quantized} --csv {out}/layers.csv": "out/layers.csv: No such file or directory",
    "export {quantized} {out} -f gptq_v2": "is of SpQR: GPTQ v2 holds affine models only, as OmniQuant gives",
    "convert {quantized} {out}": "is in our format already: it loads as it is",
    "convert {base} {out} --bits 4 --group-size 128": "its files have no qweight of any layer",
    "convert {base} {out} --omniquant {empty} --bits 3": "is no file of OmniQuant parameters, or it is damaged",
    "push {quantized} me/model --evaluation no-such.json": "no-such.json: No such file or directory",
}


@pytest.fixture(scope="module")
def places(base: Path, quantized: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mistakes")
    made = {name: folder / name for name in ("bare", "broken", "out")}
    shutil.copytree(base, made["bare"], ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(base, made["broken"])
    (made["broken"] / "config.json").write_text("{not JSON")
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(bytes(range(128, 256)))
    (folder / "columns.jsonl").write_text('{"id": "a1", "body": "a long text"}\n')
    files = {name.partition(".")[0]: folder / name for name in ("empty.txt", "binary.txt", "columns.jsonl")}
    return {"base": base, "quantized": quantized, "data": dataset, **made, **files}


@pytest.mark.parametrize("call", MISTAKES)
def test_one_line_says_what_to_do(run: Any, places: dict[str, Path], call: str) -> None:
    result = run(*(word.format(**places) for word in call.split()))
    assert result.code == 1
    assert MISTAKES[call] in result.err
    assert len(result.err.splitlines()[-1]) < 400
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.err.endswith(lines[0] + "\n") and "Traceback" not in result.err
    assert not places["out"].exists()
