"""Accuracy at a size: SpQR and OmniQuant beside the methods of other libraries, each with its own code.

    python -m benchmarks.accuracy MODEL CALIBRATION.jsonl HELDOUT.jsonl
    python -m benchmarks.accuracy --print

Every cell quantizes the linear layers of the blocks anew, from float32 and on the same calibration sequences, puts the
weights that the method computes with into the float32 model and scores the last documents of the held-out file one
by one: perplexity, and the mean over tokens of the Kullback-Leibler divergence from the unquantized model. No kernel
takes part. A cell that is already in benchmarks/results/accuracy_<model>.json is not computed again. Libraries that
are not installed are named and skipped, and so are those that cannot quantize layers of this width.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import machine
from benchmarks.accuracy_peers import Job, TooNarrow
from benchmarks.cells import Cells, Row, argument_parser, texts
from hf_spqr.calibration.data import calibration_windows
from hf_spqr.evaluate import default_seqlen, perplexity

SETTINGS = ("documents", "nsamples", "seqlen")
PLAIN = "OmniQuant, plain errors"


class Method(NamedTuple):
    """One line of the table: a file of benchmarks/accuracy_peers and what it is asked for."""

    size: str
    name: str
    peer: str
    settings: dict[str, Any]


def affine(size: str, bits: int, group: int) -> list[Method]:
    """What writes codes with a scale and a zero point for each group."""
    grid = {"bits": bits, "group": group}
    ours = {"bits": bits, "group_size": group}
    asymmetric = {"sym": False} if bits == 2 else {}
    return [
        Method(size, "OmniQuant", "ours", {"method": "omniquant", **ours}),
        Method(size, PLAIN, "ours", {"method": "omniquant", **ours, "learning": {"fisher": False}}),
        Method(size, "RTN", "ours", {"method": "rtn", **ours}),
        Method(size, "GPTQ", "ours", {"method": "gptq", **ours}),
        Method(size, "GPTQModel GPTQ", "gptqmodel", {"method": "gptq", **grid} | asymmetric),
        *([Method(size, "GPTQModel AWQ", "gptqmodel", {"method": "awq", **grid})] if bits == 4 else []),
        Method(size, "AutoRound", "auto_round", grid | ({"enable_alg_ext": True} if bits == 2 else {})),
        Method(size, "torchao RTN", "torchao", {**grid, "hqq": False}),
        Method(size, "torchao HQQ", "torchao", {**grid, "hqq": True}),
    ]


def spqr(size: str, nominal: float) -> Method:
    return Method(size, "SpQR", "ours", {"method": "spqr", "nominal": nominal})


def llama_cpp(size: str, kind: str, importance: bool = True) -> Method:
    name = f"llama.cpp {kind}{', imatrix' if importance else ''}"
    return Method(size, name, "llama_cpp", {"kind": kind, "importance": importance})


METHODS = [
    spqr("2", 2.5625),
    *affine("2", 2, 32),
    Method("2", "HQQ", "hqq", {"bits": 2, "group": 64}),
    llama_cpp("2", "Q2_K", False), llama_cpp("2", "Q2_K"), llama_cpp("2", "IQ2_S"),
    spqr("3", 3.59375),
    *affine("3", 3, 32),
    Method("3", "HQQ", "hqq", {"bits": 3, "group": 64}),
    llama_cpp("3", "Q3_K", False), llama_cpp("3", "Q3_K"), llama_cpp("3", "IQ3_S"),
    spqr("4", 4.625),
    *affine("4", 4, 32),
    Method("4", "HQQ", "hqq", {"bits": 4, "group": 64}),
    Method("4", "bitsandbytes NF4", "bitsandbytes", {"double": False}),
    llama_cpp("4", "Q4_0"), llama_cpp("4", "Q4_K", False), llama_cpp("4", "Q4_K"), llama_cpp("4", "IQ4_NL"),
    spqr("3 g128", 3.1484375),
    *affine("3 g128", 3, 128),
    llama_cpp("3 g128", "IQ3_XXS"),
    spqr("4 g128", 4.15625),
    *affine("4 g128", 4, 128),
    Method("4 g128", "bitsandbytes NF4, double", "bitsandbytes", {"double": True}),
    llama_cpp("4 g128", "IQ4_XS"),
]  # fmt: skip
SIZES = {
    "2": "2 bits, groups of 32", "3": "3 bits, groups of 32", "4": "4 bits, groups of 32",
    "3 g128": "3 bits, groups of 128", "4 g128": "4 bits, groups of 128",
}  # fmt: skip


@torch.no_grad()
def divergence(full: nn.Module, model: nn.Module, tokenizer: Any, documents: list[str]) -> float:
    """Mean over the predicted tokens of KL(full || model), in nats."""
    total, tokens, most = 0.0, 0, default_seqlen(full)
    for document in documents:
        ids = torch.tensor(tokenizer(document, verbose=False)["input_ids"][:most])[None]
        if ids.shape[1] > 1:
            expected, found = (m(ids).logits[0, :-1].float().log_softmax(-1) for m in (full, model))
            total += float(torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True))
            tokens += len(expected)
    return total / tokens


def filled(folder: str, tensors: dict[str, Tensor]) -> nn.Module:
    """The model of ``folder`` in float32 with some tensors replaced."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    unknown = model.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    assert not unknown.unexpected_keys
    return model


def version(package: str | None) -> str | None:
    return package and f"{package} {metadata.version(package)}"


def cell(method: Method, job: Job, documents: list[str]) -> Row:
    """Quantize with ``method`` and score ``documents``. Raises ImportError and TooNarrow as the peers do."""
    module = importlib.import_module(f"benchmarks.accuracy_peers.{method.peer}")
    torch.manual_seed(job.seed)
    begin = time.process_time()
    made = module.quantize(job, **method.settings)
    seconds = time.process_time() - begin
    model = filled(job.folder, made.tensors)
    score = perplexity(model, job.tokenizer, documents, batch_size=32)
    return {
        "size": method.size, "method": method.name, "seed": job.seed, "perplexity": score.perplexity,
        "divergence": divergence(job.model(), model, job.tokenizer, documents), "bits_per_weight": made.bits,
        "nominal": made.bits if made.nominal is None else made.nominal, "cpu_seconds": round(seconds, 1),
        "tokens": score.tokens, "settings": method.settings, "package": version(module.PACKAGE),
    }  # fmt: skip


def table(results: list[dict[str, Any]], size: str, seeds: Sequence[int] = (0,)) -> str:
    """Perplexity and, in thousandths of a nat, divergence of each method, means over ``seeds``; lowest in bold.

    Bits are nominal ones, and in parentheses what is stored in these models where that is more.
    """
    heads = [f"{result['model']} ({result['full']:.3f})" for result in results]
    names = list(dict.fromkeys(method.name for method in METHODS if method.size == size))
    found: dict[tuple[str, int], list[Row]] = {}
    for at, result in enumerate(results):
        for row in result["rows"]:
            if row["size"] == size and row["seed"] in seeds:
                found.setdefault((row["method"], at), []).append(row)
    shown = {
        key: (f"{mean(r['perplexity'] for r in rows):.3f}", f"{1000 * mean(r['divergence'] for r in rows):.2f}")
        for key, rows in found.items()
    }
    best = {at: [min((float(s[i]) for (_, a), s in shown.items() if a == at), default=0) for i in (0, 1)]
            for at in range(len(results))}  # fmt: skip
    lines = ["| | bits | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for name in names:
        rows = [row for (method, _), rows in found.items() if method == name for row in rows]
        if not rows:
            continue
        shown_cells = [
            " / ".join(f"**{s}**" if float(s) == low else s for s, low in zip(shown[name, at], best[at], strict=True))
            if (name, at) in shown else "–"
            for at in range(len(results))
        ]  # fmt: skip
        wide = f"{mean(row['nominal'] for row in rows):.2f}"
        stored = sorted(row["bits_per_weight"] for row in rows)
        if stored[-1] - mean(row["nominal"] for row in rows) > 0.005:
            wide += f" ({stored[0]:.2f}–{stored[-1]:.2f})"
        lines.append(f"| {name} | {wide} | " + " | ".join(shown_cells) + " |")
    return "\n".join(lines)


def main() -> None:
    names = list(dict.fromkeys(method.name for method in METHODS))
    parser = argument_parser(__doc__)
    parser.add_argument("--print", action="store_true", help="print the tables of what is there and stop")
    parser.add_argument("--documents", type=int, default=100, help="held-out documents, from the end of the file")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="draws of the calibration data; --print: mean over them"
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    args = parser.parse_args()
    if args.print:
        results = [json.loads(path.read_text()) for path in sorted(machine.RESULTS.glob("accuracy_*.json"))]
        there = {row["size"] for result in results for row in result["rows"]}
        shown = [(size, title) for size, title in SIZES.items() if size in there]
        print("\n\n".join(f"**{title}**\n\n{table(results, size, args.seeds)}" for size, title in shown))
        return
    if args.heldout is None:
        parser.error("model, calibration and heldout are needed")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration, documents = texts(args.calibration, args.heldout, args.documents)

    def start() -> dict[str, Any]:
        score = perplexity(filled(args.model, {}), tokenizer, documents, batch_size=32)
        return {"model": Path(args.model).name, "full": score.perplexity}

    try:
        cells = Cells(f"accuracy_{Path(args.model).name}", {key: getattr(args, key) for key in SETTINGS}, start)
    except ValueError as error:
        parser.error(str(error))
    for seed in args.seeds:
        windows = calibration_windows(
            calibration, tokenizer, nsamples=args.nsamples, seqlen=args.seqlen, seed=seed
        )  # fmt: skip
        job = Job(args.model, tokenizer, windows, seed)
        for method in METHODS:
            wanted = method.size in args.sizes and method.name in args.methods
            if wanted and not cells.known(size=method.size, method=method.name, seed=seed):
                try:
                    cells.add(cell(method, job, documents))
                except (ImportError, OSError, TooNarrow) as error:
                    print(f"{method.name} at {SIZES[method.size]} left out: {error}", flush=True)


if __name__ == "__main__":
    main()
