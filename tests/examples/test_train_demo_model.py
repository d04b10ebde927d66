"""The training script's own pieces; the training itself is only smoked."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_demo_model.py"
spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
assert spec is not None and spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_files_are_in_a_fixed_order_and_split_apart() -> None:
    files = script.source_files()
    assert len(files) > 200 and files == sorted(files)
    assert not any("site-packages" in path.parts or "test" in path.parts for path in files)
    training, held = script.split_files(files, seed=0)
    assert sorted([*training, *held]) == files
    assert script.split_files(files, seed=0) == (training, held)


def test_documents_hold_all_of_a_file_in_order(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("\n\n".join(f"def function_{i}():\n    return {i}" for i in range(400)) + "\n" + "x = 1;" * 500)
    pieces = list(script.documents(path))
    assert max(map(len, pieces)) <= script.DOCUMENT_CHARS
    kept, whole = "".join("".join(pieces).split()), "".join(path.read_text().split())
    assert whole.startswith(kept) and len(whole) - len(kept) < 200
    assert pieces[1].startswith("def function_")


def test_makes_a_folder_that_loads(tmp_path: Path) -> None:
    small = "--files 30 --steps 2 --batch 1 --seqlen 32 --layers 1 --hidden 64 --vocab 300".split()
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path), *small], check=True, capture_output=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "demo-model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "demo-model")
    assert model.config.vocab_size == len(tokenizer) == 300
    assert "2 steps of 1 x 32" in (tmp_path / "demo-model/README.md").read_text()
    with (tmp_path / "demo-heldout.jsonl").open() as lines:
        assert json.loads(next(lines))["text"]
