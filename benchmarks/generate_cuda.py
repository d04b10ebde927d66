"""Tokens per second of decoding one sequence with Llama-shaped models of random weights, packed and dense.

    python benchmarks/generate_cuda.py [--models 7b,70b] [--kinds bf16,spqr,affine] [--layers N] [--generate]

By default one step of decoding (transformers' model, a static cache of 512 tokens, greedy choice) is captured in a
CUDA graph and replayed; the median step counts. With ``--generate`` transformers' own ``generate`` runs, which
compiles the step. All kinds of a model have the same number of layers: as many as fit with the largest kind asked for.
The limit is the time in which the weights of a token are read at the bandwidth that this run measured for an addition.
Writes benchmarks/results/generate_cuda-<gpu>.json (generate_compiled_cuda-<gpu>.json with ``--generate``).
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from statistics import median
from typing import Any

import torch
from generate_models import KINDS, Decoder, build, linear_bytes, llama, packed_modules, read_per_token
from machine import save
from transformers import LlamaConfig, LlamaForCausalLM

from hf_spqr import ops

CACHE_TOKENS = 512
STEPS = 50
NEW_TOKENS = 64
PROMPT = 16
SPARE_BYTES = 4 << 30  # cache, head, logits, workspaces, fragmentation


def bandwidth() -> float:
    """Bytes per second of ``c = a + b`` over 1 GiB each."""
    a, b, c = (torch.ones(1 << 28, device="cuda") for _ in range(3))
    return 3 * a.nbytes / median(timed(lambda: torch.add(a, b, out=c)) for _ in range(20))


def timed(call: Any) -> float:
    """Seconds on the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def seconds_of_graph(model: LlamaForCausalLM) -> float:
    """Median of a replayed step."""
    decoder = Decoder(model, CACHE_TOKENS, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            logits = decoder.step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if not logits.isfinite().all():
        raise SystemExit("the logits are not finite: the model computes nonsense, its speed means nothing")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    return median([timed(graph.replay) for _ in range(STEPS + 5)][5:])


@torch.no_grad()
def seconds_of_generate(model: LlamaForCausalLM) -> float:
    """Per token of the second ``generate``, prefill of a short prompt included."""
    prompt = torch.randint(3, model.config.vocab_size, (1, PROMPT), device="cuda")

    def generate() -> None:
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), cache_implementation="static", do_sample=False,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=0,
        )  # fmt: skip
        if out.shape[1] != PROMPT + NEW_TOKENS:
            raise SystemExit(f"generate gave {out.shape[1] - PROMPT} tokens, not {NEW_TOKENS}")

    generate()
    torch.cuda.synchronize()
    start = time.perf_counter()
    generate()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / NEW_TOKENS


def layers_that_fit(config: LlamaConfig, kinds: list[str], free: int) -> int:
    """Layers of the largest kind; packed weights take less than 0.3 of bf16's bytes."""
    per_layer = linear_bytes(config) * (1.0 if "bf16" in kinds else 0.3)
    fit = int((free - SPARE_BYTES) // per_layer)
    if fit < 1:
        raise SystemExit(f"{free / 2**30:.1f} GiB are free on the GPU: not enough for one layer")
    return min(config.num_hidden_layers, fit)


def measure(config: LlamaConfig, kind: str, per_second: float, generate: bool) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    model = build(config, kind, "cuda")
    read = read_per_token(model)
    seconds = seconds_of_generate(model) if generate else seconds_of_graph(model)
    return {
        "kind": kind,
        "layers": config.num_hidden_layers,
        "packed_modules": packed_modules(model),
        "weight_bytes": sum(weight.nbytes for weight in model.parameters()),
        "read_per_token_bytes": read,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "milliseconds_per_token": 1e3 * seconds,
        "tokens_per_second": 1 / seconds,
        "of_byte_limit": read / per_second / seconds,
    }


def line(entry: dict[str, Any], all_layers: int) -> str:
    return (
        f"{entry['model']:>4} {entry['kind']:7} {entry['layers']:3} of {all_layers} layers "
        f"{entry['tokens_per_second']:8.1f} tokens/s {100 * entry['of_byte_limit']:5.1f} % of the byte limit, "
        f"weights {entry['weight_bytes'] / 2**30:6.2f} GiB, peak {entry['peak_allocated_bytes'] / 2**30:6.2f} GiB"
    )


def release() -> None:
    """Compiled code and graphs hold weights too."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def choices(allowed: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(allowed)}")
        return chosen

    return parse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=choices(("7b", "70b")), default=["7b", "70b"], help="default 7b,70b")
    parser.add_argument("--kinds", type=choices(KINDS), default=list(KINDS), help="default bf16,spqr,affine")
    parser.add_argument("--layers", type=int, help="at most so many layers")
    parser.add_argument("--generate", action="store_true", help="transformers' generate, compiled (slow to start)")
    parser.add_argument("--seconds-budget", type=float, default=float("inf"), help="start no model after this time")
    parser.add_argument("--ending", default="", help="of the name of the results' file")
    found = parser.parse_args()
    if found.layers is not None and found.layers < 1:
        parser.error("--layers must be at least 1")
    return found


def main() -> None:
    started = time.monotonic()
    asked = arguments()
    if not ops.COMPILED_CUDA:
        raise SystemExit(f"the CUDA extension is not there: {ops.WHY_NOT.get('_C_cuda')}")
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name()
    per_second = bandwidth()
    release()
    print(f"{gpu}: an addition moves {1e-12 * per_second:.2f} TB/s", flush=True)
    how = "generate_compiled_cuda" if asked.generate else "generate_cuda"
    name = f"{how}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}{asked.ending}"
    results: list[dict[str, Any]] = []
    left_out: list[str] = []
    for model in asked.models:
        full = llama(model)
        layers = layers_that_fit(full, asked.kinds, torch.cuda.mem_get_info()[0])
        config = llama(model, min(layers, asked.layers or layers))
        for kind in asked.kinds:
            if time.monotonic() - started > asked.seconds_budget:
                left_out.append(f"{model} {kind}")
                print(f"{model:>4} {kind:7} left out: out of time", flush=True)
            else:
                results.append({"model": model, **measure(config, kind, per_second, asked.generate)})
                release()
                print(line(results[-1], full.num_hidden_layers), flush=True)
            path = save(name, {
                "gpu": gpu, "cuda": torch.version.cuda, "cache_tokens": CACHE_TOKENS,
                "new_tokens": NEW_TOKENS if asked.generate else STEPS, "add_bytes_per_second": per_second,
                "results": results, "left_out": left_out,
            })  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
