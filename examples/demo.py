"""The whole way on one page: quantize the demo model to 3 bits, save it, load it in a fresh process, measure it.

    python examples/demo.py            # or `make demo`, which also installs everything

Each step prints the command that it runs, so that it can be repeated by hand on another model.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent
ROOT = EXAMPLES.parent
MODEL = EXAMPLES / "demo-model"
CALIBRATION = EXAMPLES / "demo-calibration.jsonl"
HELD_OUT = EXAMPLES / "demo-heldout.jsonl"


def relative(path: Path) -> str:
    """The path from the working folder where it lies inside it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def run(*arguments: str, capture: bool = False) -> str:
    """Run ``hf-spqr ...`` or ``python ...`` in a process of its own; stop the demo when it fails."""
    print(f"\n$ {shlex.join(arguments)}", flush=True)
    program = ["-m", "hf_spqr.cli"] if arguments[0] == "hf-spqr" else []
    command = [sys.executable, *program, *arguments[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def round_to_nearest(bits: int, group_size: int, limit: int) -> dict[str, Any]:
    """Perplexity and true bits per weight of the demo model with every packed layer rounded to nearest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from hf_spqr.calibration.data import iter_documents
    from hf_spqr.evaluate import perplexity
    from hf_spqr.formats.affine import pack
    from hf_spqr.formats.columns import nbytes
    from hf_spqr.methods import rtn
    from hf_spqr.methods.base import AffineParams

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    size = weights = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            rounded = rtn.quantize(
                module.weight.detach().float(), AffineParams(bits=bits, group_size=group_size)
            ).weight
            module.weight.data.copy_(rounded.dequantize())
            size += nbytes(pack(rounded))
            weights += module.weight.numel()
    texts = [str(document) for document in iter_documents(HELD_OUT)][:limit]
    result = perplexity(model, AutoTokenizer.from_pretrained(MODEL), texts)
    return {"perplexity": result.perplexity, "bits_per_weight": 8 * size / weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out/demo", help="folder of the quantized model")
    parser.add_argument("--limit", type=int, default=100, help="evaluate on the first N held-out documents")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration sequences")
    args = parser.parse_args()
    out, base = relative(args.out), relative(MODEL)

    samples = ["--nsamples", str(args.nsamples), "--seqlen", "512"]
    run("hf-spqr", "quantize", base, out, "-d", relative(CALIBRATION), "--bits", "3", *samples, "--overwrite")
    run("hf-spqr", "inspect", out)
    run("python", relative(EXAMPLES / "load_and_generate.py"), out, "--sample")
    held_out = ["-d", relative(HELD_OUT), "--limit", str(args.limit)]
    result = json.loads(run("hf-spqr", "eval", out, "--base", base, *held_out, "--json", capture=True))

    rows = [("unquantized", result["base"]["perplexity"], 16.0)]
    rows += [("SpQR 3 bit, groups of 16", result["perplexity"], result["bits_per_weight"])]
    for group_size in (16, 128):
        rounded = round_to_nearest(3, group_size, args.limit)
        name = f"round to nearest 3 bit, groups of {group_size}"
        rows.append((name, rounded["perplexity"], rounded["bits_per_weight"]))
    print(f"\nPerplexity on held-out text ({result['protocol_text']}); bits per weight counted from bytes\n")
    print(f"{'':<38}{'perplexity':>12}{'bits/weight':>14}")
    for name, value, bits in rows:
        print(f"{name:<38}{value:>12.3f}{bits:>14.3f}")
    before, after = result["base"]["file_bytes"], result["file_bytes"]
    print(f"\nFiles: {before:,} bytes before, {after:,} bytes after (embeddings stay in 16 bit). Model in {out}")


if __name__ == "__main__":
    main()
