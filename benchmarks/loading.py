"""Time and memory of ``from_pretrained``: a packed model against the bf16 model that it stands for.

    python -m benchmarks.loading                # about 1.1 GB in bf16, written to a temporary folder

Both models are random, of one architecture, and each is loaded in a process of its own, several times, with the files
in the page cache. ``anonymous`` is memory that the process allocated; ``mapped`` belongs to the file, and the system
can drop it at any time. A packed load that repacked anything would show it as anonymous memory and as time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_spqr
from benchmarks.machine import memory, save
from hf_spqr.formats.spqr import SpQRLayout, SpQRWeight
from hf_spqr.integrations.transformers import attach
from hf_spqr.nn import SpQRLinear


def random_weight(layout: SpQRLayout, outlier_share: float = 0.005) -> SpQRWeight:
    """A valid quantized matrix of small random values."""
    n, k = layout.out_features, layout.in_features
    per_row = max(1, int(k * outlier_share))
    second = torch.tensor([0.002, 0.0, 1.0, 0.0], dtype=torch.float16)
    return SpQRWeight(
        layout=layout,
        codes=torch.randint(0, 1 << layout.bits, (n, k), dtype=torch.uint8),
        scale_codes=torch.randint(1, 1 << layout.stat_bits, (n, layout.groups), dtype=torch.uint8),
        zero_codes=torch.full((n, layout.groups), 1 << (layout.stat_bits - 1), dtype=torch.uint8),
        second=second.expand(layout.row_blocks, layout.second_groups, 4).contiguous(),
        outlier_row=(torch.arange(n + 1) * per_row).int(),
        outlier_col=torch.linspace(0, k - 1, per_row).int().repeat(n),
        outlier_value=torch.full((n * per_row,), 0.05, dtype=torch.float16),
    )


def write_models(folder: Path, hidden: int, layers: int) -> None:
    """A random bf16 model in ``folder/bf16`` and a packed one of the same shapes in ``folder/packed``."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 11 // 4 // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "bf16")
    templates: dict[SpQRLayout, dict[str, torch.Tensor]] = {}
    for name, linear in list(model.model.layers.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        layout = SpQRLayout(linear.out_features, linear.in_features)
        if layout not in templates:
            templates[layout] = SpQRLinear.from_weight(random_weight(layout), None, torch.bfloat16).packed_tensors()
        tensors = {key: tensor.clone() for key, tensor in templates[layout].items()}
        model.model.layers.set_submodule(name, SpQRLinear(layout, tensors, None, torch.bfloat16))
    attach(model, hf_spqr.SpQRConfig())
    model.save_pretrained(folder / "packed")


def measure_here(folder: str) -> dict[str, float]:
    """Load once; seconds and growth of memory in this process."""
    torch.set_num_threads(1)
    before = memory()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder)
    seconds = time.perf_counter() - start
    after = memory()
    growth = {f"{key}_bytes": after[key] - before[key] for key in after}
    start = time.perf_counter()
    with torch.no_grad():
        model(torch.arange(4)[None])
    first = time.perf_counter() - start
    after = memory()
    growth |= {f"{key}_after_a_forward_bytes": after[key] - before[key] for key in after}
    return {"seconds": seconds, "first_forward_seconds": first, **growth}


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Medians over ``repeats`` processes, after one that warms the page cache."""
    runs = []
    for _ in range(repeats + 1):
        command = [sys.executable, "-m", "benchmarks.loading", "--measure", str(folder)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
    result = {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"file_bytes": size, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_here(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder, arguments.hidden, arguments.layers)
        result = {kind: measure(folder / kind, arguments.repeats) for kind in ("bf16", "packed")}
    command = f"python -m benchmarks.loading --hidden {arguments.hidden} --layers {arguments.layers}"
    path = save("loading", {"command": command, "repeats": arguments.repeats, **result})
    for kind, values in result.items():
        print(
            f"{kind:7} file {values['file_bytes'] / 1e6:7.0f} MB, loaded in {values['seconds']:.3f} s, anonymous"
            f" {values['anonymous_bytes'] / 1e6:6.1f} MB, resident {values['resident_bytes'] / 1e6:6.1f} MB; after a"
            f" forward pass {values['anonymous_after_a_forward_bytes'] / 1e6:.1f} MB and"
            f" {values['resident_after_a_forward_bytes'] / 1e6:.1f} MB"
        )
    print(path)


if __name__ == "__main__":
    main()
