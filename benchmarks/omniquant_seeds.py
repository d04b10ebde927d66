"""The ``reference`` preset over ten draws of the calibration data, beside the numbers of OmniQuant's own code.

    python -m benchmarks.omniquant_seeds --shared ../shared
    python -m benchmarks.omniquant_seeds --print

Seed 0 is the split that the original was given, the others draw 16 segments of 128 tokens from the training text.
Errors as in omniquant_blocks, full training (20 epochs, 40 at 2 bits). Runs that are in
benchmarks/results/omniquant_seeds.json already are not repeated. ``--print`` says for every setting how many seeds
have finite numbers only, and mean and range of the held-out errors over the seeds, relative to the original's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.machine import RESULTS, save
from benchmarks.omniquant_blocks import add_outliers, run, segments
from hf_spqr.methods.omniquant import preset

NAME = "omniquant_seeds"
ORIGINAL = {
    ("W2A16", 1): (0.1406, 0.2437, 0.4488, 5.210),
    ("W2A16g64", 1): (0.0742, 0.1249, 0.2456, 5.200),
    ("W3A16", 1): (0.0250, 0.0427, 0.0792, 5.138),
    ("W4A16", 1): (0.00627, 0.0104, 0.0196, 5.127),
    ("W4A4", 1): (0.0666, 0.1451, 0.3103, 5.279),
    ("W4A4", 20): (0.0677, 0.1493, 0.3194, 5.289),
    ("W6A6", 20): (0.0036, 0.0071, 0.0143, 5.130),
}
"""Held-out errors of the three blocks and perplexity of OmniQuant's own code, by preset and factor of the outliers."""


def one(fixtures: Path, setting: str, outliers: int, seed: int) -> dict[str, Any]:
    """Quantize the model on the calibration data of ``seed``."""
    folder = fixtures / "tiny_llama"
    split = torch.load(folder / "split.pt")
    train = torch.load(folder / "data.pt")["train"]
    calibration = split["calib"] if seed == 0 else segments(train, 16, 128, 100 + seed)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    if outliers != 1:
        add_outliers(model, outliers)
    result = run(model, calibration, split["eval"], replace(preset(setting, reference=True), seed=seed))
    return {
        "setting": setting, "outliers": outliers, "seed": seed,
        "errors": [block["error"] for block in result["blocks"]],
        "perplexity": result["perplexity"],
        "skipped": sum(block["skipped"] for block in result["blocks"]),
        "kept_initial": sum(block["kept_initial"] for block in result["blocks"]),
        "cpu_seconds": round(result["cpu_seconds"], 1),
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> str:
    """A table of the rows: a line for each setting."""
    lines = ["| | seeds | finite | skipped | mean / original | lowest | highest | perplexity |", "|---" * 8 + "|"]
    for (setting, outliers), (*original, _) in ORIGINAL.items():
        mine = [row for row in rows if (row["setting"], row["outliers"]) == (setting, outliers)]
        if not mine:
            continue
        finite = sum(all(map(math.isfinite, (*row["errors"], row["perplexity"]))) for row in mine)
        blocks = [[row["errors"][b] / original[b] for row in mine] for b in range(len(original))]
        means, lows, highs = (" ".join(f"{f(b):.2f}" for b in blocks) for f in (mean, min, max))
        scores = [row["perplexity"] for row in mine]
        lines.append(
            f"| {setting}{'' if outliers == 1 else f' ×{outliers}'} | {len(mine)} | {finite} |"
            f" {sum(row['skipped'] for row in mine)} | {means} | {lows} | {highs} |"
            f" {min(scores):.3f}–{max(scores):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="folder that holds fixtures/")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--print", action="store_true", help="print the table of what is there and stop")
    args = parser.parse_args()
    known = RESULTS / f"{NAME}.json"
    rows = json.loads(known.read_text())["rows"] if known.exists() else []
    if not args.print:
        if args.shared is None:
            parser.error("--shared is needed")
        torch.set_num_threads(1)
        done = {(row["setting"], row["outliers"], row["seed"]) for row in rows}
        for seed, (setting, outliers) in itertools.product(range(args.seeds), ORIGINAL):
            if (setting, outliers, seed) not in done:
                rows.append(one(args.shared / "fixtures", setting, outliers, seed))
                print(rows[-1], flush=True)
                save(NAME, {"rows": rows})
    print(summary(rows))


if __name__ == "__main__":
    main()
