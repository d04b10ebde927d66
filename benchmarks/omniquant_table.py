"""One table in one format: perplexity of RTN, GPTQ, the published OmniQuant recipe and our default, per scheme.

    python -m benchmarks.omniquant_table MODEL CALIBRATION.jsonl HELDOUT.jsonl
    python -m benchmarks.omniquant_table --print

Every cell quantizes the model anew, in float32, on the same calibration sequences, and scores the last documents of
the held-out file one by one; documents that are scored never calibrate. Groups wider than a layer are one group per
row of that layer. A cell that is already in benchmarks/results/omniquant_table_<model>.json is not computed again, so
a run may be stopped, and cells may be asked for one at a time (--schemes, --methods). Other draws of the calibration
data (--seed) and other trainings of the default (--epochs) have files of their own.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_spqr
from benchmarks import gptq_models
from benchmarks.cells import Cells, argument_parser, texts
from benchmarks.machine import RESULTS
from hf_spqr.evaluate import perplexity

SCHEMES = ("W2A16g64", "W3A16", "W3A16g128", "W4A16g128", "W4A4", "W6A6", "W8A8")
METHODS = ("rtn", "gptq", "reference", "default")
SETTINGS = ("documents", "nsamples", "seqlen", "seed", "epochs")


def config_of(scheme: str, method: str, **fields: Any) -> hf_spqr.OmniQuantConfig:
    """RTN is the same code with nothing to learn; of GPTQ's config only the format counts."""
    if method in ("rtn", "gptq"):
        fields |= {"rounding": False, "lwc": False, "let": False, "epochs": 0}
    return hf_spqr.OmniQuantConfig.from_preset(scheme, reference=method == "reference", **fields)


def cell(folder: str, scheme: str, method: str, documents: list[str], **fields: Any) -> dict[str, Any]:
    """Quantize the model of ``folder`` and score ``documents``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = config_of(scheme, method, **fields)
    begin = time.process_time()
    if method == "gptq":
        bits = gptq_models.quantize_model(model, config)
    else:
        bits = hf_spqr.quantize_model(model, config, progress=False).bits_per_weight
    seconds = time.process_time() - begin
    score = perplexity(model, fields["tokenizer"], documents, batch_size=32)
    return {
        "scheme": scheme, "method": method, "perplexity": score.perplexity, "bits_per_weight": bits,
        "cpu_seconds": round(seconds, 1), "tokens": score.tokens,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """The cells of result files as one table: a row for each scheme, a column for each model, the lowest in bold."""
    heads = [f"{result['model']} ({result['full']:.3f})" for result in results]
    lines = [f"| {' / '.join(METHODS)} | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for scheme in SCHEMES:
        cells = []
        for result in results:
            found = {row["method"]: row["perplexity"] for row in result["rows"] if row["scheme"] == scheme}
            shown = {method: f"{value:.3f}" for method, value in found.items()}
            best = min(shown.values(), default=None, key=float)
            texts = [shown.get(method, "–") for method in METHODS]
            cells.append(" / ".join(f"**{text}**" if text == best else text for text in texts))
        lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--print", action="store_true", help="print the table of what is there and stop")
    parser.add_argument("--documents", type=int, default=100, help="held-out documents, from the end of the file")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="of the default, instead of its own")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    args = parser.parse_args()
    if args.print:
        results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("omniquant_table_*.json"))]
        wanted = (args.seed, args.epochs)
        print(table([result for result in results if (result["seed"], result.get("epochs")) == wanted]))
        return
    if args.heldout is None:
        parser.error("model, calibration and heldout are needed")
    torch.set_num_threads(1)
    name = f"omniquant_table_{Path(args.model).name}" + (f"_seed{args.seed}" if args.seed else "")
    name += "" if args.epochs is None else f"_epochs{args.epochs}"
    settings = {key: getattr(args, key) for key in SETTINGS}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration, documents = texts(args.calibration, args.heldout, args.documents)

    def start() -> dict[str, Any]:
        full = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        base = perplexity(full, tokenizer, documents, batch_size=32)
        return {"model": Path(args.model).name, "full": base.perplexity}

    try:
        cells = Cells(name, settings, start)
    except ValueError as error:
        parser.error(str(error))
    fields = {"nsamples": args.nsamples, "seqlen": args.seqlen, "seed": args.seed}
    for scheme, method in itertools.product(args.schemes, args.methods):
        if not cells.known(scheme=scheme, method=method):
            more = {"epochs": args.epochs} if method == "default" and args.epochs is not None else {}
            more |= {"dataset": calibration, "tokenizer": tokenizer}
            cells.add(cell(args.model, scheme, method, documents, **fields, **more))


if __name__ == "__main__":
    main()
