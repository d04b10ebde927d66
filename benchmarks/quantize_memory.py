"""Peak memory of quantizing a whole model inside ``from_pretrained``, against the model and one block.

    python -m benchmarks.quantize_memory        # about 220 MB in bf16

The model is random. It runs in a process of its own; the peak is what the system reports for that process (VmHWM),
less what Python and its libraries take before the model is opened. The bound to hold: the model plus what one block
needs, which is its weights in float32, its Hessians (the widest input squared, in float64, and the float32 copies of
the solver), and the activations of the calibration data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_spqr
from benchmarks.machine import memory, peak_resident, save


def write_model(folder: Path, hidden: int, layers: int) -> None:
    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=hidden * 11 // 4 // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


class Sampler(threading.Thread):
    """Watches the anonymous memory of this process: what it allocated, without pages mapped from the file."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            self.peak = max(self.peak, memory()["anonymous"])


def measure_here(folder: str, nsamples: int, seqlen: int) -> dict[str, Any]:
    """Quantize in this process and say what it took."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 8192, (nsamples, seqlen), generator=generator)
    before, sampler = memory(), Sampler()
    sampler.start()
    start = time.perf_counter()
    config = hf_spqr.SpQRConfig(dataset=ids, nsamples=nsamples, seqlen=seqlen)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    seconds = time.perf_counter() - start
    sampler.done.set()
    sampler.join()
    report = model.quantization_report
    return {
        "seconds": seconds,
        "peak_resident_bytes": peak_resident() - before["resident"],
        "peak_anonymous_bytes": sampler.peak - before["anonymous"],
        "packed_bytes": report.nbytes,
        "bits_per_weight": report.bits_per_weight,
        "libraries_bytes": before["resident"],
    }


def needs_of_one_block(folder: Path, nsamples: int, seqlen: int) -> dict[str, int]:
    """Bytes of a block's parts, from its shapes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder))
    linears = [m for m in model.model.layers[0].modules() if isinstance(m, nn.Linear)]
    weights = sum(m.weight.numel() for m in linears)
    widths = [model.config.hidden_size] * 3 + [model.config.intermediate_size]  # q/k/v, o, gate/up, down
    widest = max(widths)
    return {
        "block_weights_float32_bytes": 4 * weights,
        "hessians_bytes": sum(8 * w * w for w in widths) + 4 * 4 * widest * widest,
        "activations_bytes": 2 * 2 * nsamples * seqlen * model.config.hidden_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_here(arguments.measure, arguments.nsamples, arguments.seqlen)))
        return
    options = [f"--{key}={getattr(arguments, key)}" for key in ("hidden", "layers", "nsamples", "seqlen")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder, arguments.hidden, arguments.layers)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        block = needs_of_one_block(folder, arguments.nsamples, arguments.seqlen)
        command = [sys.executable, "-m", "benchmarks.quantize_memory", "--measure", str(folder), *options]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        result = json.loads(output.splitlines()[-1])
    bound = size + sum(block.values())
    result = {"model_bytes": size, **block, "model_plus_block_bytes": bound, **result}
    path = save("quantize_memory", {"command": f"python -m benchmarks.quantize_memory {' '.join(options)}", **result})
    print(
        f"model {size / 1e6:.0f} MB, one block {sum(block.values()) / 1e6:.0f} MB, together {bound / 1e6:.0f} MB\n"
        f"peak {result['peak_resident_bytes'] / 1e6:.0f} MB, of which allocated"
        f" {result['peak_anonymous_bytes'] / 1e6:.0f} MB (packed result {result['packed_bytes'] / 1e6:.0f} MB);"
        f" {result['seconds']:.0f} s\n{path}"
    )


if __name__ == "__main__":
    main()
