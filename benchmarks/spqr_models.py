"""Perplexity of small real models under SpQR: the published settings against the default.

    python -m benchmarks.spqr_models --shared ../shared --models babyllama105 babyllama361 stories260k

Calibration on stories 1500-1627, perplexity per story on stories 500-699 of text/tinystories.jsonl. Bits per weight of
the quantized layers: of the paper's formula (the published settings of a permutation and row counters are not in it),
and of the packed tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import save
from hf_spqr import SpQRConfig
from hf_spqr.errors import ConfigError
from hf_spqr.evaluate import perplexity
from hf_spqr.quantize import quantize_model

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("published, 3 bit", {"mode": "reference"}),
    ("published, 3 bit, damping 0.01", {"mode": "reference", "percdamp": 0.01}),
    ("published, 4 bit", {"mode": "reference", "bits": 4}),
    ("default, 3 bit", {}),
    ("default, 3 bit, more outliers", {"outlier_threshold": 0.17}),
    ("default, 3 bit, damping 0.01", {"percdamp": 0.01}),
    ("default, 3 bit, damping 0.1", {"percdamp": 0.1}),
    ("default, 3 bit, permuted", {"act_order": True}),
    ("default, 3 bit, no outliers", {"outlier_threshold": math.inf}),
    ("default, 3 bit, 4.14 bits in the file", {"bits": 3, "group_size": 16, "target_bits": 4.14}),
    ("default, 3 bit, 4.63 bits in the file", {"bits": 3, "group_size": 16, "target_bits": 4.63}),
    ("default, 4 bit", {"bits": 4}),
    ("default, 4 bit, no outliers", {"bits": 4, "outlier_threshold": math.inf}),
]


def score(model: Any, tokenizer: Any, texts: list[str]) -> float:
    return perplexity(model, tokenizer, texts, batch_size=32).perplexity


def run(folder: Path, texts: list[str], names: list[str] | None) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = score(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer, texts[500:700])
    rows: list[dict[str, Any]] = [{"model": folder.name, "setting": "float32", "perplexity": base}]
    for name, fields in SETTINGS:
        if names and name not in names:
            continue
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = SpQRConfig(dataset=texts[1500:1628], seqlen=256, nsamples=128, **fields)
        start = time.process_time()
        try:
            report = quantize_model(model, config, tokenizer=tokenizer, progress=False)
        except ConfigError as error:  # a size that so narrow layers cannot have
            print(f"{folder.name}  {name}  {error}", flush=True)
            continue
        seconds = time.process_time() - start
        weights = sum(math.prod(layer.shape) for layer in report.layers)
        share = sum(layer.outliers for layer in report.layers) / weights
        found = score(model, tokenizer, texts[500:700])
        rows.append(
            {
                "model": folder.name,
                "setting": name,
                "perplexity": found,
                "loss_percent": 100 * math.log(found / base),
                "outlier_percent": 100 * share,
                "paper_bits": config.bits + 0.625 + 32 * share,
                "file_bits": report.bits_per_weight,
                "cpu_seconds": seconds,
            }
        )
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in rows[-1].items()), flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and text/tinystories.jsonl")
    parser.add_argument("--models", nargs="+", default=["babyllama105", "babyllama361", "stories260k"])
    parser.add_argument("--settings", nargs="+", help="only these")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/spqr_models.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = (arguments.shared / "text" / "tinystories.jsonl").read_text().splitlines()
    stories = [json.loads(line)["text"] for line in lines]
    results = [
        row
        for name in arguments.models
        for row in run(arguments.shared / "models" / name, stories, arguments.settings)
    ]
    if arguments.save:
        save("spqr_models", {"rows": results})
