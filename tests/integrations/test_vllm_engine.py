"""Packed models in vLLM's engine against Transformers; skipped without a vLLM that runs on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from transformers import AutoModelForCausalLM
from vllm.platforms import current_platform

from hf_spqr import OmniQuantConfig, SpQRConfig
from hf_spqr.config import PackedConfig

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 6, 7, 8, 9, 10], list(range(40, 80)), [3, 3]]
DATA = {"dataset": str(ROOT / "examples" / "demo-calibration.jsonl"), "nsamples": 8, "seqlen": 128}
CONFIGS = {
    "spqr": lambda: SpQRConfig(overrides={"k_proj": {"bits": 4}}, modules_to_not_convert=["layers.2.mlp"], **DATA),
    "omniquant": lambda: OmniQuantConfig(bits=4, group_size=32, epochs=0, **DATA),
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (current_platform.is_cpu() or current_platform.is_cuda_alike()), reason="this vLLM does not run here"
    ),
]


def generate(folder: Path, ranks: int, mode: str, plugin: Path) -> list[dict[str, list]]:
    """``plugin``: a folder for the entry points of this checkout, which vLLM's processes look up."""
    import tomllib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    info = plugin / "hf_spqr_checkout-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-spqr-checkout\nVersion: 0\n")
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{lines}")
    path = os.pathsep.join([str(plugin), str(ROOT), os.environ.get("PYTHONPATH", "")])
    script, out = ROOT / "tests" / "integrations" / "vllm_generate.py", plugin / "out.json"
    run = subprocess.run(
        [sys.executable, script, folder, str(ranks), mode, out],
        input=json.dumps(PROMPTS),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {method: tmp_path_factory.mktemp(method) for method in CONFIGS}


def quantized(folder: Path, config: PackedConfig) -> torch.nn.Module:
    if not (folder / "config.json").exists():
        base = ROOT / "examples" / "demo-model"
        AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(folder)
        for file in base.glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", CONFIGS)
def test_same_tokens_as_transformers(folders, tmp_path, method, ranks, mode):
    model = quantized(folders[method], CONFIGS[method]())
    if ranks > 1 and not current_platform.is_cpu() and torch.cuda.device_count() < ranks:
        pytest.skip("one GPU for each rank")
    for prompt, output in zip(PROMPTS, generate(folders[method], ranks, mode, tmp_path), strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert output["tokens"] == whole[0, len(prompt) :].tolist()
        with torch.no_grad():
            steps = model(whole).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = steps.gather(1, torch.tensor(output["tokens"])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output["logprobs"]), expected, rtol=0, atol=2e-3)
