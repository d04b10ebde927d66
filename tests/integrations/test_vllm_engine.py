"""Packed models in vLLM's engine against Transformers; skipped without a vLLM that runs on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch

pytest.importorskip("vllm")

from transformers import AutoModelForCausalLM
from vllm.platforms import current_platform

from hf_spqr import OmniQuantConfig, SpQRConfig
from hf_spqr.config import PackedConfig
from tests.tiny_models import byte_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 6, 7, 8, 9, 10], list(range(40, 80)), [3, 3]]
DATA = {"dataset": str(ROOT / "examples" / "demo-calibration.jsonl"), "nsamples": 8, "seqlen": 128}
CONFIGS = {
    "spqr": lambda: SpQRConfig(overrides={"k_proj": {"bits": 4}}, modules_to_not_convert=["layers.2.mlp"], **DATA),
    "ordered": lambda: SpQRConfig(act_order=True, **DATA),
    "omniquant": lambda: OmniQuantConfig(bits=4, group_size=32, epochs=0, **DATA),
    "w8a8": lambda: OmniQuantConfig(
        bits=8, group_size=-1, act_bits=8, epochs=0, learning={"quantize_attention": False}, **DATA
    ),
}
CLOSE = {"w8a8": 0.03}  # an input between two of its 256 steps may fall on either side, by a last bit before
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (current_platform.is_cpu() or current_platform.is_cuda_alike()), reason="this vLLM does not run here"
    ),
]


def environment(plugin: Path) -> dict[str, str]:
    """``plugin``: a folder for the entry points of this checkout, which vLLM's processes look up."""
    import tomllib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    info = plugin / "hf_spqr_checkout-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-spqr-checkout\nVersion: 0\n")
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{lines}")
    path = os.pathsep.join([str(plugin), str(ROOT), os.environ.get("PYTHONPATH", "")])
    vllm = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**os.environ, **vllm, "PYTHONPATH": path}


def generate(folder: Path, ranks: int, mode: str, plugin: Path) -> list[dict[str, list]]:
    script, out = ROOT / "tests" / "integrations" / "vllm_generate.py", plugin / "out.json"
    run = subprocess.run(
        [sys.executable, script, folder, str(ranks), mode, out],
        input=json.dumps(PROMPTS),
        capture_output=True,
        text=True,
        env=environment(plugin),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(out.read_text())


@contextmanager
def server(folder: Path, plugin: Path) -> Iterator[str]:
    """``vllm serve`` until the block ends; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += "--host 127.0.0.1 --dtype float32 --max-model-len 128 --max-num-seqs 4 --enforce-eager".split()
    log = plugin / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment(plugin), cwd=plugin)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-3000:]
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


MIXTURES = {
    "mixtral": lambda texts: SpQRConfig(dataset=texts, nsamples=4, seqlen=32),
    "qwen3_moe": lambda texts: OmniQuantConfig(bits=4, group_size=16, epochs=0, dataset=texts, nsamples=4, seqlen=32),
}


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
    same_tokens(model, folders[method], ranks, mode, tmp_path, CLOSE.get(method, 2e-3))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_of_experts(texts, tmp_path, kind, ranks, mode):
    """Random models of the kind; heads as wide as this vLLM's attention wants them."""
    base, folder = tmp_path / "base", tmp_path / "packed"
    tiny_model(kind, num_attention_heads=2, num_key_value_heads=2, head_dim=32).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=MIXTURES[kind](texts)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    same_tokens(model, folder, ranks, mode, tmp_path, 2e-3)


def same_tokens(model: torch.nn.Module, folder: Path, ranks: int, mode: str, plugin: Path, close: float) -> None:
    """vLLM's tokens are those of ``model``, with log-probabilities that differ by ``close`` at most."""
    if ranks > 1 and not current_platform.is_cpu() and torch.cuda.device_count() < ranks:
        pytest.skip("one GPU for each rank")
    for prompt, output in zip(PROMPTS, generate(folder, ranks, mode, plugin), strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert output["tokens"] == whole[0, len(prompt) :].tolist()
        with torch.no_grad():
            steps = model(whole).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = steps.gather(1, torch.tensor(output["tokens"])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output["logprobs"]), expected, rtol=0, atol=close)


def test_the_server_answers(folders, tmp_path):
    model = quantized(folders["spqr"], CONFIGS["spqr"]())
    ids = torch.tensor([PROMPTS[0]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0]
    call = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    with server(folders["spqr"], tmp_path) as address:
        request = Request(f"{address}/v1/completions", json.dumps(call).encode(), {"Content-Type": "application/json"})
        with urlopen(request) as answer:
            tokens = json.load(answer)["choices"][0]["token_ids"]
    assert tokens == expected[len(PROMPTS[0]) :].tolist()
