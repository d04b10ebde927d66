"""SpQR at a size: what ``target_bits`` chooses, beside larger groups or fewer bits and more outliers instead.

    python -m benchmarks.spqr_sizes examples/demo-model examples/demo-calibration.jsonl examples/demo-heldout.jsonl
    python -m benchmarks.spqr_sizes --print

Models, texts, scores and sizes are those of benchmarks/accuracy.py; cells that are there are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import machine
from benchmarks.accuracy import Method, cell
from benchmarks.accuracy_peers import Job
from benchmarks.cells import Cells, argument_parser, texts
from hf_spqr.calibration.data import calibration_windows

NSAMPLES, SEQLEN, DOCUMENTS = 128, 256, 100
CHOSEN, LARGER, FEWER = "chosen", "larger groups", "fewer bits"
WAYS: dict[float, dict[str, tuple[int, int]]] = {
    2.5: {CHOSEN: (2, 32), LARGER: (2, 64)},
    3.0: {CHOSEN: (2, 16), LARGER: (2, 32)},
    3.16: {CHOSEN: (3, 64), LARGER: (3, 128), FEWER: (2, 16)},
    3.6: {CHOSEN: (3, 16), LARGER: (3, 32), FEWER: (2, 8)},
    4.16: {CHOSEN: (4, 64), LARGER: (4, 128), FEWER: (3, 16)},
    4.6: {CHOSEN: (4, 16), LARGER: (4, 32), FEWER: (3, 8)},
}
"""Bits and group size; outliers take what is left of the size, which is one of wide layers."""


def method(size: float, way: str) -> Method:
    bits, group_size = WAYS[size][way]
    # what is chosen is left to target_bits: the table is of what it does
    fields = {} if way == CHOSEN else {"bits": bits, "group_size": group_size}
    return Method(f"{size:g}", way, "ours", {"method": "spqr", "nominal": size, **fields})


def table(results: list[dict[str, Any]]) -> str:
    """Divergence in thousandths of a nat (mean over seeds) and bits, a line for each model and size."""
    lines = [f"| | bits | {CHOSEN} | {LARGER} | {FEWER} |", "|---|---|---|---|---|"]
    for result in results:
        for size in sorted({float(row["size"]) for row in result["rows"]}):
            ways, cells = WAYS[size], []
            for way in (CHOSEN, LARGER, FEWER):
                rows = [r for r in result["rows"] if r["size"] == f"{size:g}" and r["method"] == way]
                if not rows:
                    cells.append("–")
                    continue
                loss = 1000 * sum(row["divergence"] for row in rows) / len(rows)
                bits = sum(row["nominal"] for row in rows) / len(rows)
                cells.append(f"{loss:.2f} ({'/'.join(map(str, ways[way]))}, {bits:.2f})")
            lines.append(f"| {result['model']} | {size:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--print", action="store_true", help="print the table of what is there and stop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="draws of the calibration data")
    parser.add_argument("--sizes", type=float, nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    if args.print:
        print(table([json.loads(path.read_text()) for path in sorted(machine.RESULTS.glob("spqr_sizes_*.json"))]))
        return
    if args.heldout is None:
        parser.error("model, calibration and heldout are needed")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration, documents = texts(args.calibration, args.heldout, DOCUMENTS)
    name = Path(args.model).name
    cells = Cells(
        f"spqr_sizes_{name}", {"documents": DOCUMENTS, "nsamples": NSAMPLES, "seqlen": SEQLEN}, lambda: {"model": name}
    )
    for seed in args.seeds:
        windows = calibration_windows(calibration, tokenizer, nsamples=NSAMPLES, seqlen=SEQLEN, seed=seed)
        job = Job(args.model, tokenizer, windows, seed)
        for size in args.sizes:
            for way in WAYS[size]:
                if not cells.known(size=f"{size:g}", method=way, seed=seed):
                    cells.add(cell(method(size, way), job, documents))


if __name__ == "__main__":
    main()
