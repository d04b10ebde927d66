"""One table in one format: perplexity of RTN, the published OmniQuant recipe and our default, per scheme.

    python -m benchmarks.omniquant_table MODEL CALIBRATION HELDOUT --documents 100 --out results.json

Every cell quantizes MODEL anew with ``hf_spqr.quantize_model`` and scores the last documents of HELDOUT one by one;
documents that are scored never calibrate. Schemes whose
groups are wider than a layer fall back to one group per row of that layer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_spqr
from benchmarks.machine import machine
from hf_spqr.calibration.data import iter_documents
from hf_spqr.evaluate import perplexity

SCHEMES = ("W2A16g64", "W3A16", "W3A16g128", "W4A16g128", "W4A4", "W6A6", "W8A8")
METHODS = ("rtn", "reference", "default")


def config_of(scheme: str, method: str, **fields: Any) -> hf_spqr.OmniQuantConfig:
    """RTN is the same code with nothing to learn."""
    if method == "rtn":
        fields |= {"rounding": False, "lwc": False, "let": False, "epochs": 0}
    return hf_spqr.OmniQuantConfig.from_preset(scheme, reference=method == "reference", **fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", help="txt, json or jsonl")
    parser.add_argument("heldout", help="txt, json or jsonl")
    parser.add_argument("--documents", type=int, default=100, help="held-out documents, from the end of the file")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = [text for text in iter_documents(args.heldout) if isinstance(text, str)][-args.documents :]
    kept_out = set(documents)
    calibration = [text for text in iter_documents(args.calibration) if text not in kept_out]
    full = AutoModelForCausalLM.from_pretrained(args.model).eval()
    base = perplexity(full, tokenizer, documents, protocol="per-document")
    rows: list[dict[str, Any]] = []
    print(f"full precision {base.perplexity:.4f}")
    for scheme, method in itertools.product(args.schemes, args.methods):
        config = config_of(
            scheme, method, dataset=calibration, tokenizer=tokenizer, nsamples=args.nsamples, seqlen=args.seqlen
        )
        model = AutoModelForCausalLM.from_pretrained(args.model).eval()
        begin = time.process_time()
        report = hf_spqr.quantize_model(model, config, progress=False)
        seconds = time.process_time() - begin
        score = perplexity(model, tokenizer, documents, protocol="per-document")
        rows.append({
            "scheme": scheme, "method": method, "bits_per_weight": report.bits_per_weight, "cpu_seconds": seconds,
            "perplexity": score.perplexity, **asdict(score),
        })  # fmt: skip
        print(f"{scheme} {method}: {score.perplexity:.4f}, {report.bits_per_weight:.3f} bits, {seconds:.0f} CPU-s")
        result = {"model": args.model, "full": base.perplexity, "nsamples": args.nsamples, "seqlen": args.seqlen,
                  "machine": machine(), "rows": rows}  # fmt: skip
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
