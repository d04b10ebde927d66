"""Perplexity of a causal language model, with the protocol stated in the result.

Perplexities are comparable only under one protocol; three are offered:

``per-document``    each document on its own, with the special tokens that the tokenizer adds; every token but the
                    first is scored; documents longer than ``seqlen`` are cut there.
``concatenated``    all documents joined by a blank line, tokenized once and cut into windows of ``seqlen`` tokens that
                    do not overlap; the rest that does not fill a window is dropped. GPTQ, SpQR and OmniQuant report
                    WikiText-2 this way.
``sliding-window``  the same stream, windows move on by ``stride`` tokens and only the tokens that are new in a window
                    are scored, so that each has at least ``seqlen - stride`` tokens of context; nothing is dropped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_spqr.calibration.data import check_tokens
from hf_spqr.errors import CalibrationError, ConfigError, NonFiniteError

__all__ = ["PROTOCOLS", "Perplexity", "default_seqlen", "perplexity"]

PROTOCOLS = ("per-document", "concatenated", "sliding-window")
Tokens = list[int]


@dataclass(frozen=True)
class Perplexity:
    """Result of :func:`perplexity`.

    protocol             one of :data:`PROTOCOLS`
    nll                  mean negative log likelihood in nats per token, every scored token counted once
    tokens               number of scored tokens
    documents            number of documents (per-document) or windows (the others) with at least one scored token
    nll_documents        mean over documents of their own mean nll (per-document only, else None)
    seqlen, stride       tokens per window; how far it moves (None for per-document)
    truncated            documents that were cut at ``seqlen`` (per-document only)
    seconds              wall-clock time
    """

    protocol: str
    nll: float
    tokens: int
    documents: int
    nll_documents: float | None
    seqlen: int
    stride: int | None
    truncated: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp of the mean nll per token."""
        return math.exp(self.nll)

    @property
    def perplexity_documents(self) -> float | None:
        """exp of the mean over documents of their mean nll; None unless per-document."""
        return None if self.nll_documents is None else math.exp(self.nll_documents)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object with both perplexities written out."""
        return {**asdict(self), "perplexity": self.perplexity, "perplexity_documents": self.perplexity_documents}

    def describe(self) -> str:
        """The protocol in words."""
        if self.protocol == "per-document":
            cut = f", {self.truncated} cut at {self.seqlen} tokens" if self.truncated else ""
            return f"per document, {self.documents} documents, {self.tokens} tokens{cut}"
        step = "no overlap" if self.stride == self.seqlen else f"stride {self.stride}"
        return f"{self.protocol}, windows of {self.seqlen} tokens, {step}, {self.tokens} tokens"


@dataclass(frozen=True)
class _Window:
    """Token ids, and the first position whose token is scored."""

    tokens: Tokens
    first: int


def default_seqlen(model: nn.Module, most: int = 2048) -> int:
    """The model's number of positions, at most ``most``."""
    config: Any = model.config
    get_text_config = getattr(config, "get_text_config", None)
    text_config = get_text_config() if get_text_config else config
    return min(most, getattr(text_config, "max_position_embeddings", None) or most)


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[str | Sequence[int]],
    *,
    protocol: str = "per-document",
    seqlen: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score ``documents`` with a causal language model.

    Args:
        model: a Transformers causal LM; it is put into evaluation mode for the time of the call.
        tokenizer: its tokenizer; may be None when all documents are token ids.
        documents: texts, or lists of token ids (taken as they are).
        protocol: one of :data:`PROTOCOLS`, see the module's text.
        seqlen: tokens per window; None = the model's positions, at most 2048.
        stride: tokens between two windows, for ``sliding-window`` only; None = half of ``seqlen``.
        batch_size: windows per forward pass.
        on_progress: called with (windows done, windows in all) after each forward pass.

    Raises:
        ConfigError: the model has an encoder, unknown protocol, or ``seqlen``, ``stride`` or ``batch_size`` out of
            range.
        CalibrationError: nothing can be scored, e.g. every document is shorter than two tokens, or the model has no
            embedding for a token.
        NonFiniteError: the model gives NaN or infinity.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol={protocol!r}: use one of {', '.join(PROTOCOLS)}.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} has an encoder: perplexity is that of a causal language model.")
    seqlen = default_seqlen(model) if seqlen is None else seqlen
    if seqlen < 2:
        raise ConfigError(f"seqlen={seqlen}: use at least 2 tokens.")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: use at least 1.")
    if stride is not None and protocol != "sliding-window":
        raise ConfigError(f'stride has no meaning for protocol {protocol!r}; use "sliding-window" or leave it out.')
    truncated = 0
    if protocol == "per-document":
        encoded = [ids for ids in (_encode(tokenizer, document) for document in documents) if len(ids) > 1]
        truncated = sum(len(ids) > seqlen for ids in encoded)
        windows = [_Window(ids[:seqlen], 1) for ids in encoded]
    else:
        stride = seqlen if protocol == "concatenated" else (seqlen // 2 if stride is None else stride)
        if not 1 <= stride <= seqlen:
            raise ConfigError(f"stride={stride}: use 1 to seqlen ({seqlen}).")
        stream = _concatenate(tokenizer, documents)
        windows = list(_windows(stream, seqlen, stride, keep_rest=protocol == "sliding-window"))
    if not windows:
        raise CalibrationError(
            f"nothing to score: the text gives no window under protocol {protocol!r} with seqlen={seqlen}. Give more"
            " text or a smaller seqlen."
        )
    check_tokens(model, min(min(w.tokens) for w in windows), max(max(w.tokens) for w in windows))
    start = time.monotonic()
    sums, counts = _score(model, windows, batch_size, on_progress)
    if not math.isfinite(sum(sums)):
        raise NonFiniteError(
            "The model gives NaN or infinity on this text, so there is no perplexity. Load it in bfloat16 or float32"
            " if float16 overflows, and check its weights."
        )
    return Perplexity(
        protocol=protocol,
        nll=sum(sums) / sum(counts),
        tokens=sum(counts),
        documents=len(windows),
        nll_documents=(
            sum(s / c for s, c in zip(sums, counts, strict=True)) / len(windows)
            if protocol == "per-document"
            else None
        ),
        seqlen=seqlen,
        stride=stride,
        truncated=truncated,
        seconds=time.monotonic() - start,
    )


def _encode(tokenizer: Any, document: str | Sequence[int]) -> Tokens:
    if not isinstance(document, str):
        return [int(token) for token in document]
    if tokenizer is None:
        raise ConfigError("tokenizer is None, but the documents are texts; give the model's tokenizer.")
    return list(tokenizer(document, verbose=False)["input_ids"])


def _concatenate(tokenizer: Any, documents: Sequence[str | Sequence[int]]) -> Tokens:
    """One stream: texts joined by a blank line and tokenized once, lists of token ids end to end."""
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) == len(documents):
        return _encode(tokenizer, "\n\n".join(texts))
    return [token for document in documents for token in _encode(tokenizer, document)]


def _windows(stream: Tokens, seqlen: int, stride: int, keep_rest: bool) -> Iterator[_Window]:
    scored = 1  # the first token of the stream has no context
    for begin in range(0, len(stream), stride):
        end = min(begin + seqlen, len(stream))
        if end - begin < seqlen and not keep_rest:
            return
        if end > max(scored, begin + 1):
            yield _Window(stream[begin:end], max(scored - begin, 1))
            scored = end
        if end == len(stream):
            return


@torch.inference_mode()
def _score(
    model: nn.Module, windows: list[_Window], batch_size: int, on_progress: Callable[[int, int], None] | None
) -> tuple[list[float], list[int]]:
    """Sum of the nll in nats and number of scored tokens, for each window in the given order."""
    device = next(model.parameters()).device
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].tokens))  # little padding
    sums, counts = [0.0] * len(windows), [0] * len(windows)
    training = model.training
    model.eval()
    try:
        for begin in range(0, len(order), batch_size):
            indices = order[begin : begin + batch_size]
            batch = [windows[i] for i in indices]
            nll = _batch_nll(model, [window.tokens for window in batch], device)
            for row, (i, window) in enumerate(zip(indices, batch, strict=True)):
                sums[i] = nll[row, window.first - 1 : len(window.tokens) - 1].double().sum().item()
                counts[i] = len(window.tokens) - window.first
            if on_progress is not None:
                on_progress(min(begin + batch_size, len(order)), len(order))
    finally:
        model.train(training)
    return sums, counts


def _batch_nll(model: nn.Module, batch: list[Tokens], device: torch.device) -> Tensor:
    """nll of token t + 1 given the tokens up to t: fp32 ``[B, T - 1]``; positions past a row's end are meaningless."""
    longest = max(len(tokens) for tokens in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    ids = ids.to(device)
    logits = model(input_ids=ids, attention_mask=mask.to(device), use_cache=False).logits[:, :-1]
    targets = ids[:, 1:].to(logits.device)
    return torch.stack(
        [
            nn.functional.cross_entropy(row.float(), target, reduction="none")
            for row, target in zip(logits, targets, strict=True)
        ]
    )
