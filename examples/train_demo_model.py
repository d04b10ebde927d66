"""Train the demo model: a small Llama on the sources of the Python standard library.

Everything the model sees is already on the machine: the ``.py`` files of the running interpreter's standard library
(code, comments and docstrings, Python Software Foundation License).  The file list, the cut into documents, the split
and the seed are fixed, so that the same Python version gives the same data.

    python examples/train_demo_model.py                 # about half an hour of CPU time on one core
    python examples/train_demo_model.py --steps 50 --files 40 --out /tmp/try

Writes ``examples/demo-model/`` (a normal Transformers folder), ``examples/demo-heldout.jsonl`` (documents of files
that the model never saw) and ``examples/demo-calibration.jsonl`` (documents of training files).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "lib2to3", "idlelib", "encodings"}
MAX_FILE_BYTES = 300_000
DOCUMENT_CHARS = 1500
BOS = "<s>"


def source_files() -> list[Path]:
    """Return the standard library's Python files, sorted by their path inside it."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(relative.parts) and 200 < path.stat().st_size < MAX_FILE_BYTES:
            files.append(path)
    return files


def documents(path: Path) -> Iterator[str]:
    """Cut one file into documents of 200 to ``DOCUMENT_CHARS`` characters, at blank lines where there is one.

    Shorter pieces are dropped.
    """
    text = path.read_text(encoding="utf-8", errors="ignore")
    while text:
        cut = len(text)
        if cut > DOCUMENT_CHARS:
            for mark in ("\n\n\n", "\n\n", "\n"):
                cut = text.rfind(mark, DOCUMENT_CHARS // 2, DOCUMENT_CHARS)
                if cut > 0:
                    break
            else:
                cut = DOCUMENT_CHARS
        piece, text = text[:cut].strip("\n"), text[cut:].lstrip("\n")
        if len(piece) >= 200:
            yield piece


def split_files(files: list[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """Return (training files, held-out files); one file in twelve is held out."""
    shuffled = list(files)
    random.Random(seed).shuffle(shuffled)
    held = max(1, len(shuffled) // 12)
    return shuffled[held:], shuffled[:held]


def write_jsonl(path: Path, texts: list[str], limit_bytes: int) -> None:
    """Write ``{"text": ...}`` lines until ``limit_bytes`` of text are written."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            if written >= limit_bytes:
                break
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())


def train_tokenizer(texts: list[str], vocab_size: int):
    """Train a byte-level BPE tokenizer that puts the BOS token before every document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS)


def encode(tokenizer, texts: list[str]) -> Tensor:
    """Tokenize and join documents: int64 ``[tokens]``, a BOS before each document."""
    return torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])


def build_model(vocab_size: int, args: argparse.Namespace):
    """Return a randomly initialised Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # residual branches start small, as in GPT-2
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1 / math.sqrt(2 * args.layers))
    return model


def loss_of(model, batch: Tensor, bf16: bool) -> Tensor:
    """Mean cross entropy in nats of the next token; ``batch`` is int64 ``[B, T + 1]``."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over 4 % of the steps, then a cosine down to 2 % of the peak."""
    warmup = max(1, args.steps // 25)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.steps - warmup)
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def validate(model, held: Tensor, args: argparse.Namespace) -> float:
    """Mean loss over a fixed stretch of the held-out tokens."""
    model.eval()
    count = min(16, (held.numel() - 1) // args.seqlen)
    batches = held[: count * args.seqlen + 1].unfold(0, args.seqlen + 1, args.seqlen)
    losses = [loss_of(model, batches[i : i + 4], args.bf16).item() for i in range(0, count, 4)]
    model.train()
    return sum(losses) / len(losses)


def train(model, tokens: Tensor, held: Tensor, args: argparse.Namespace) -> float:
    """Train in place with AdamW; return the last validation loss."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8)
    windows = tokens[: (tokens.numel() - 1) // args.seqlen * args.seqlen + 1].unfold(0, args.seqlen + 1, args.seqlen)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.empty(0, dtype=torch.int64)
    start, smooth, valid = time.monotonic(), None, math.nan
    model.train()
    for step in range(args.steps):
        while order.numel() < args.batch:
            order = torch.cat([order, torch.randperm(windows.shape[0], generator=generator)])
        index, order = order[: args.batch], order[args.batch :]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss = loss_of(model, windows[index], args.bf16)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            valid = validate(model, held, args)
            spent = time.monotonic() - start
            print(
                f"step {step + 1}/{args.steps}  loss {smooth:.4f}  held-out {valid:.4f}  {spent:.0f} s  "
                f"{(step + 1) * args.batch * args.seqlen / spent:.0f} tokens/s",
                flush=True,
            )
    return valid


MODEL_CARD = """---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
---

# Demo model

A Llama of {parameters:,} parameters ({layers} layers, hidden size {hidden}, grouped-query attention, tied embeddings,
byte-level BPE with {vocab} entries), made by `examples/train_demo_model.py` for the demo and the tests of hf_spqr.
It writes text that looks like Python and is of no other use.

- **Data**: the source files of the standard library of Python {python} (code, comments, docstrings), Copyright
  Python Software Foundation, Python Software Foundation License Version 2; cut into documents of at most
  {chars} characters. One file in twelve is held out: `../demo-heldout.jsonl` has documents of held-out files,
  `../demo-calibration.jsonl` documents of training files. Both are excerpts of the standard library under the same
  license.
- **Training**: {steps} steps of {batch} x {seqlen} tokens ({epochs:.1f} passes), AdamW, peak learning rate {lr},
  seed {seed}, {minutes:.0f} minutes on {threads} CPU thread(s), torch {torch}. Held-out loss at the end:
  {loss:.3f} nats per token.
- **Weights**: bfloat16.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder that receives demo-model/ and the two jsonl files"
    )
    parser.add_argument("--files", type=int, help="take only the first N source files, for a quick try")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast to bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    training_files, held_files = split_files(source_files()[: args.files], args.seed)
    training = [text for path in training_files for text in documents(path)]
    held = [text for path in held_files for text in documents(path)]
    random.Random(args.seed).shuffle(held)
    calibration = random.Random(args.seed + 1).sample(training, min(400, len(training)))
    write_jsonl(args.out / "demo-heldout.jsonl", held, 300_000)
    write_jsonl(args.out / "demo-calibration.jsonl", calibration, 400_000)

    tokenizer = train_tokenizer(training, args.vocab)
    tokens, held_tokens = encode(tokenizer, training), encode(tokenizer, held)
    tokenizer.model_max_length = 1024
    model = build_model(len(tokenizer), args)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(training_files)} files, {len(training)} documents, {tokens.numel()} training tokens, "
        f"{held_tokens.numel()} held-out tokens, {parameters} parameters",
        flush=True,
    )
    start = time.monotonic()
    loss = train(model, tokens, held_tokens, args)

    out = args.out / "demo-model"
    model.eval().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    card = MODEL_CARD.format(
        parameters=parameters,
        layers=args.layers,
        hidden=args.hidden,
        vocab=len(tokenizer),
        python=platform.python_version(),
        chars=DOCUMENT_CHARS,
        steps=args.steps,
        batch=args.batch,
        seqlen=args.seqlen,
        epochs=args.steps * args.batch * args.seqlen / tokens.numel(),
        lr=args.lr,
        seed=args.seed,
        minutes=(time.monotonic() - start) / 60,
        threads=args.threads,
        torch=torch.__version__,
        loss=loss,
    )
    (out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
