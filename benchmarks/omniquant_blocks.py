"""Held-out block error and perplexity of OmniQuant on the small fixture models, block by block.

    python -m benchmarks.omniquant_blocks --shared ../shared --setting W2A16g64 --preset reference --samples 16
    python -m benchmarks.omniquant_blocks --shared ../shared --setting W4A4 --outliers 20 --model tiny_opt

Block error: mean squared error of a block's output on 32 held-out segments of 128 tokens, target from the
full-precision chain, input from the quantized chain (mean over elements; the input and output share the residual).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.machine import machine
from hf_spqr.calibration.blocks import Block, find_blocks, record
from hf_spqr.methods.omniquant import OmniQuantParams, preset, quantize_block
from hf_spqr.methods.omniquant.runner import BlockRunner


def segments(data: Tensor, number: int, length: int, seed: int) -> Tensor:
    """Random segments of ``data``, int64 ``[number, length]``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(data) - length - 1, (number,), generator=generator)
    return torch.stack([data[start : start + length] for start in starts]).long()


@torch.no_grad()
def add_outliers(model: nn.Module, factor: float, channels: int = 4) -> None:
    """Multiply some channels of every norm's output and divide the consumers' columns: the same function."""
    generator = torch.Generator().manual_seed(0)
    for block in find_blocks(model):
        modules = dict(block.module.named_modules())
        chains = [("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                  ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
                  ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                  ("final_layer_norm", ("fc1",))]  # fmt: skip
        for norm, consumers in chains:
            if norm not in modules:
                continue
            chosen = torch.randperm(modules[norm].weight.numel(), generator=generator)[:channels]
            for parameter in modules[norm].parameters():
                parameter[chosen] *= factor
            for name in consumers:
                modules[name].weight[:, chosen] /= factor


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp())


@torch.no_grad()
def perplexity_from(model: nn.Module, last: Block, hidden: Tensor, ids: Tensor) -> float:
    """Perplexity when the last block returns ``hidden``."""
    last.module.forward = lambda *args, **kwargs: hidden
    try:
        return perplexity(model, ids)
    finally:
        del last.module.__dict__["forward"]


def run(model: nn.Module, calib: Tensor, held: Tensor, params: OmniQuantParams) -> dict[str, Any]:
    """Quantize every block in turn; errors on ``held``, perplexity, seconds of CPU time in training."""
    blocks = find_blocks(model)
    recorded, judged = record(model, blocks, [calib[:1]]), record(model, blocks, [held[:1]])
    fp, held_fp = embeddings(model, blocks, calib), embeddings(model, blocks, held)
    quant, held_q = fp.clone(), held_fp.clone()
    rows, seconds = [], 0.0
    for number, block in enumerate(blocks):
        call = recorded.calls[number][0]
        if call.args:
            raise SystemExit("this script expects blocks that are called with keyword arguments")
        linears = {name: m for name, m in block.module.named_modules() if isinstance(m, nn.Linear)}
        begin = time.process_time()
        result = quantize_block(block.module, fp, quant, call.kwargs, params, linears)
        seconds += time.process_time() - begin
        runner = BlockRunner(block.module, judged.calls[number][0].kwargs, list(linears))
        tensors = {f"{name}.weight": weight.dequantize() for name, weight in result.weights.items()} | result.folded
        attention = params.act_bits if params.quantize_attention else None
        samples = range(len(held))
        with torch.no_grad():
            held_fp = runner(held_fp, samples)
            held_q = runner(held_q, samples, tensors, params.act_bits, attention, params.act_sym)
        fp, quant = result.outputs_fp, result.outputs_q
        rows.append({
            "error": float(F.mse_loss(held_q, held_fp)), "nearest": result.loss_nearest,
            "initial": result.loss_initial, "final": result.loss_final, "kept_initial": result.kept_initial,
            "skipped": result.skipped, "steps": len(result.losses), "pairs": result.pairs,
        })  # fmt: skip
    return {"blocks": rows, "perplexity": perplexity_from(model, blocks[-1], held_q, held), "cpu_seconds": seconds}


def embeddings(model: nn.Module, blocks: list[Block], ids: Tensor) -> Tensor:
    """Hidden states ``[S, T, H]`` that enter the first block."""
    return record(model, blocks, [ids]).hidden[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder that holds fixtures/")
    parser.add_argument("--model", default="tiny_llama")
    parser.add_argument("--setting", default="W2A16g64", help="a preset's name")
    parser.add_argument("--preset", choices=("default", "reference", "rtn"), default="default")
    parser.add_argument(
        "--samples", type=int, default=64, help="16: the given split; else drawn from the training text"
    )
    parser.add_argument("--outliers", type=float, default=1.0)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other parameters, as Python values"
    )
    parser.add_argument("--seed", type=int, default=2, help="of the calibration segments drawn from the training text")
    parser.add_argument("--out", type=Path, help="append the result to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fixtures = args.shared / "fixtures"
    data = torch.load(fixtures / "tiny_llama" / "data.pt")
    split = torch.load(fixtures / "tiny_llama" / "split.pt")
    given = args.samples == 16 and args.seed == 2
    calib = split["calib"] if given else segments(data["train"], args.samples, 128, args.seed)
    model = AutoModelForCausalLM.from_pretrained(fixtures / args.model, attn_implementation="sdpa").eval()
    before = perplexity(model, split["eval"])
    if args.outliers != 1:
        add_outliers(model, args.outliers)
    params = preset(args.setting, reference=args.preset == "reference")
    if args.preset == "rtn":
        params = replace(params, rounding=False, lwc=False, let=False, epochs=0)
    extra = {key: eval(value, {"torch": torch}) for key, value in (item.split("=", 1) for item in args.set)}
    params = replace(params, **extra)
    result = run(model, calib, split["eval"], params)
    errors = [row["error"] for row in result["blocks"]]
    row_ = {
        "model": args.model, "setting": args.setting, "preset": args.preset, "samples": args.samples,
        "outliers": args.outliers, "seed": args.seed, "set": args.set,
        "errors": errors, "perplexity_full": before, **result,
    }  # fmt: skip
    steps = sum(row["steps"] for row in result["blocks"])
    print(
        f"{args.model} {args.setting} {args.preset} x{args.outliers:g} {args.samples} samples:",
        " ".join(f"{error:.5f}" for error in errors),
        f"ppl {result['perplexity']:.3f} (full {before:.4f}) {result['cpu_seconds']:.1f} CPU-s, {steps} steps",
        f"skipped {sum(row['skipped'] for row in result['blocks'])}",
        f"kept initial {sum(row['kept_initial'] for row in result['blocks'])}",
    )
    if args.out:
        known = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
        args.out.write_text(json.dumps({"machine": machine(), "rows": [*known, row_]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
