"""Tokens per second and time to first token of transformers' ``generate`` on the CPU, packed and dense.

    python benchmarks/generate_cpu.py [--model 1b] [--threads 1 2] [--rounds 3] [--compile]

Llama-shaped models of random weights, all kinds in memory at once and called in turn. A round of a kind is one
``generate`` of NEW_TOKENS after a short prompt, of which the time between two tokens counts, and one of a single token
after a prompt of 512. Medians over all tokens and over the rounds. With ``--compile`` generate compiles its decoding
step over a static cache; the prompt runs as it is written. "of limit" is the time in which the weights of a token
are read at the bandwidth that this run measured. Writes benchmarks/results/generate_cpu-<processor>.json; settings
that are not measured this time stay in it.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median
from typing import Any

import torch
from generate_models import KINDS, build, llama, read_per_token
from machine import file_name, machine, merge, save
from torch import Tensor
from transformers import CompileConfig, LlamaForCausalLM

from hf_spqr import ops
from hf_spqr.bench.timing import measure, plain_read

NEW_TOKENS = 24
PROMPT = 16
LONG_PROMPT = 512
SETTING = ("model", "threads", "compiled")


class Clock:
    """Asked by ``generate`` after each token whether to stop; notes the time."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, tokens: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(tokens), dtype=torch.bool)

    def seconds(self) -> list[float]:
        """To the first token, and between the others."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def generate(model: LlamaForCausalLM, prompt: int, new_tokens: int, compiled: bool) -> list[float]:
    """Seconds to the first token and between the others."""
    tokens = torch.randint(3, model.config.vocab_size, (1, prompt))
    options: dict[str, Any] = {}
    if compiled:
        options = {"cache_implementation": "static", "compile_config": CompileConfig(mode="default")}
        options["compile_config"]._compile_all_devices = True  # else generate compiles on GPUs only
    clock = Clock()
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, min_new_tokens=new_tokens,
        max_new_tokens=new_tokens, pad_token_id=0, stopping_criteria=[clock], **options,
    )  # fmt: skip
    if out.shape[1] != prompt + new_tokens or len(clock.times) != new_tokens + 1:
        raise SystemExit(f"generate gave {out.shape[1] - prompt} tokens, not {new_tokens}")
    return clock.seconds()


def bandwidth() -> float:
    """Bytes per second that all threads read."""
    read = plain_read(64 << 20)
    return read.nbytes / measure([read], torch.empty(0), 1.0)["read"].seconds


def run(models: dict[str, LlamaForCausalLM], rounds: int, compiled: bool) -> list[dict[str, Any]]:
    per_token: dict[str, list[float]] = {kind: [] for kind in models}
    first: dict[str, list[float]] = {kind: [] for kind in models}
    for model in models.values():
        generate(model, PROMPT, 3, compiled)
    reads = []
    for _ in range(rounds):
        reads.append(bandwidth())
        for kind, model in models.items():
            per_token[kind] += generate(model, PROMPT, NEW_TOKENS, compiled)[2:]
            if not compiled:
                first[kind] += generate(model, LONG_PROMPT, 1, compiled)
    return [
        {
            "kind": kind,
            "weight_bytes": sum(weight.nbytes for weight in model.parameters()),
            "read_per_token_bytes": read_per_token(model),
            "read_bytes_per_second": max(reads),
            "seconds_per_token": median(per_token[kind]),
            "seconds_to_first_of_512": median(first[kind]) if first[kind] else None,
        }
        for kind, model in models.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"{first['model']}, {first['threads']} threads{', compiled' if first['compiled'] else ''}")
    print(f"{'':8s}{'GiB':>8s}{'tokens/s':>10s}{'x bf16':>8s}{'of limit':>10s}{'first of 512':>14s}{'x bf16':>8s}")
    for row in rows:
        seconds, prompt = row["seconds_per_token"], row["seconds_to_first_of_512"]
        limit = row["read_per_token_bytes"] / row["read_bytes_per_second"]
        text = f"{prompt:12.2f} s{prompt / first['seconds_to_first_of_512']:8.2f}" if prompt else ""
        print(
            f"{row['kind']:8s}{row['weight_bytes'] / 2**30:8.2f}{1 / seconds:10.2f}"
            f"{first['seconds_per_token'] / seconds:8.2f}{limit / seconds:10.2f}{text}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b", choices=("1b", "1.1b", "7b"), help="Llama 3.2, TinyLlama, Llama 2")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the decoding step (no long prompt)")
    args = parser.parse_args()
    if not ops.COMPILED:
        raise SystemExit(f"the compiled kernels are missing: {ops.WHY_NOT.get('_C')}")
    if max(args.threads) > (os.cpu_count() or 1):
        parser.error(f"this machine has {os.cpu_count()} processors")
    torch.manual_seed(0)
    config = llama(args.model, args.layers)
    models = {kind: build(config, kind, "cpu") for kind in KINDS}
    name = args.model + (f" {args.layers} layers" if args.layers else "")
    path = file_name("generate_cpu", machine()["processor"])
    rows: list[dict[str, Any]] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        setting = {"model": name, "threads": threads, "compiled": args.compile}
        here = [setting | row for row in run(models, args.rounds, args.compile)]
        show(here)
        rows += here
    print(save(path, {"isa": torch.ops.hf_spqr.cpu_isa(), "rows": merge(path, rows, SETTING)}))


if __name__ == "__main__":
    main()
