"""Generates with vLLM: FOLDER, RANKS, "compiled" or "eager", file for tokens and log-probabilities; ids on stdin."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":  # vLLM's processes import this file again
    from vllm import LLM, SamplingParams

    folder, ranks, mode, out = sys.argv[1:]
    engine = LLM(
        model=folder,
        dtype="float32",
        tensor_parallel_size=int(ranks),
        enforce_eager=mode == "eager",
        max_model_len=128,
        max_num_seqs=4,
        gpu_memory_utilization=0.3,
    )
    prompts = [{"prompt_token_ids": ids} for ids in json.load(sys.stdin)]
    results = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12, logprobs=1))
    found = []
    for result in results:
        output = result.outputs[0]
        steps = zip(output.token_ids, output.logprobs, strict=True)
        found.append({"tokens": list(output.token_ids), "logprobs": [step[token].logprob for token, step in steps]})
    Path(out).write_text(json.dumps(found))
