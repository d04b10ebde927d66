"""Load a model with plain Transformers and write text. Nothing here names hf_spqr: installing it is enough.

python examples/load_and_generate.py out/demo --prompt 'import os'
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = 'def read_file(path):\n    """'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=80, help="how many tokens to write")
    parser.add_argument(
        "--sample", action="store_true", help="draw tokens at temperature 0.6 instead of the likeliest"
    )
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(0)
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    kind = {"do_sample": True, "temperature": 0.6} if args.sample else {"do_sample": False}
    tokens = model.generate(**inputs, max_new_tokens=args.tokens, pad_token_id=tokenizer.eos_token_id, **kind)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
