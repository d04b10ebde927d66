"""What `backend="int8_activations"` gains and costs: times of layers, and perplexity of models.

    python benchmarks/int8_activations.py times [--threads 1 2] [--tokens 2 4 8 16 64 128 512] [--seconds 5]
    python benchmarks/int8_activations.py perplexity [--shared ../shared]

Times are those of 4096 x 4096 layers, exact, rounded and torch's bfloat16, called in turn as in kernels_cpu.py.

Perplexity: per document, float32, of the demo model on its held-out texts and, with --shared, of the models there on
stories 500-599 of text/tinystories.jsonl. Every layer's input is rounded as `hf_spqr.ops.reference` says, for any
number of tokens. Models are quantized with SpQR's defaults, and to affine 4 bit by rounding to nearest.

Writes benchmarks/results/int8_activations-<processor>.json and int8_perplexity.json, which kernels_cpu_table.py puts
into docs/cpu.md.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from machine import file_name, machine, merge, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_spqr import OmniQuantConfig, SpQRConfig, ops
from hf_spqr.bench import weights
from hf_spqr.bench.timing import dense, measure, module, rotating
from hf_spqr.evaluate import perplexity
from hf_spqr.nn import PackedLinear
from hf_spqr.ops.reference import round_activations
from hf_spqr.quantize import quantize_model

SIZE = 4096
EXAMPLES = Path(__file__).parents[1] / "examples"
SHARED = ("stories260k", "babyllama105", "babyllama361")
ROUND_TO_NEAREST = {"bits": 4, "group_size": 128, "epochs": 0, "lwc": False, "rounding": False}


def layers() -> dict[str, PackedLinear]:
    found = {
        "affine 4 g128": weights.affine_linear(SIZE, SIZE),
        "affine 4 g32": weights.affine_linear(SIZE, SIZE, group_size=32),
        "affine 2 g128": weights.affine_linear(SIZE, SIZE, bits=2),
        "spqr 3 g16": weights.spqr_linear(SIZE, SIZE, outliers=0),
        "spqr 3 g16 1%": weights.spqr_linear(SIZE, SIZE),
    }
    return {name: layer.requires_grad_(False) for name, layer in found.items()}


def times(threads: list[int], tokens: list[int], seconds: float) -> None:
    found = [dense(SIZE, SIZE, torch.bfloat16)]
    for name, layer in layers().items():
        rounded = copy.deepcopy(layer)
        rounded.backend = "int8_activations"
        found += [module(name, layer, layer.nbytes()), module(f"{name} int8", rounded, layer.nbytes())]
    rows: list[dict[str, Any]] = []
    for count in threads:
        torch.set_num_threads(count)
        copies = rotating(found)
        for number in tokens:
            timed = measure(found, torch.randn(number, SIZE).bfloat16(), seconds, copies)
            bf16 = timed["torch bf16"].seconds
            print(f"\n{number} tokens, {count} threads, torch bf16 {bf16 * 1e6:.0f} us")
            for name in layers_of(timed):
                exact, int8 = timed[name].seconds, timed[f"{name} int8"].seconds
                print(
                    f"{name:16s}{exact * 1e6:8.0f} us, {bf16 / exact:5.2f} x bf16"
                    f"   int8 {int8 * 1e6:8.0f} us, {bf16 / int8:5.2f} x bf16, {exact / int8:5.2f} x exact",
                    flush=True,
                )
            rows += [{"threads": count, "tokens": number, "name": name, **asdict(t)} for name, t in timed.items()]
    name = file_name("int8_activations", machine()["processor"])
    result = {"isa": torch.ops.hf_spqr.cpu_isa(), "rows": merge(name, rows, ("threads", "tokens", "name"))}
    print("wrote", save(name, result))


def layers_of(timed: dict[str, Any]) -> list[str]:
    """Names of the layers that were timed both ways."""
    return [name.removesuffix(" int8") for name in timed if name.endswith(" int8")]


def round_input(layer: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (round_activations(arguments[0], layer.perm),)  # type: ignore[arg-type]


def texts_of(path: Path) -> list[str]:
    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [one["text"] if isinstance(one, dict) else one for one in documents]


def models(shared: Path | None) -> list[tuple[Path, list[str], list[str]]]:
    """Folder, texts to calibrate on, texts to measure."""
    demo = [texts_of(EXAMPLES / f"demo-{name}.jsonl") for name in ("calibration", "heldout")]
    found = [(EXAMPLES / "demo-model", *demo)]
    if shared is not None:
        stories = texts_of(shared / "text" / "tinystories.jsonl")
        found += [(shared / "models" / name, stories[1500:1564], stories[500:600]) for name in SHARED]
    return found


def perplexities(shared: Path | None) -> None:
    rows = []
    for folder, calibration, texts in models(shared):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        data: dict[str, Any] = {"dataset": calibration, "seqlen": 256, "nsamples": 64}
        for name, config in (
            ("spqr 3 g16", SpQRConfig(**data)),
            ("affine 4 g128", OmniQuantConfig(**ROUND_TO_NEAREST, **data)),
        ):
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            quantize_model(model, config, tokenizer=tokenizer, progress=False)
            exact = perplexity(model, tokenizer, texts, batch_size=32).perplexity
            for layer in model.modules():
                if isinstance(layer, PackedLinear):
                    layer.register_forward_pre_hook(round_input)
            rounded = perplexity(model, tokenizer, texts, batch_size=32).perplexity
            print(f"{folder.name:14s}{name:14s} exact {exact:8.4f}, int8 {rounded:8.4f}, {rounded / exact - 1:+.3%}")
            rows.append({"model": folder.name, "name": name, "exact": exact, "int8": rounded})
    print("wrote", save("int8_perplexity", {"rows": rows}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("times", "perplexity"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 4, 8, 16, 64, 128, 512])
    parser.add_argument("--seconds", type=float, default=5.0, help="per number of threads and tokens")
    parser.add_argument("--shared", type=Path, help="folder of further models and texts")
    args = parser.parse_args()
    if args.what == "perplexity":
        perplexities(args.shared)
    elif ops.COMPILED:
        times(args.threads, args.tokens, args.seconds)
    else:
        raise SystemExit(f"the compiled kernels are missing: {ops.WHY_NOT.get('_C')}")


if __name__ == "__main__":
    main()
