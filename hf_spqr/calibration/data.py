"""Text to calibration sequences: every form of ``dataset`` becomes a list of token tensors of at most ``seqlen``."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_spqr.errors import CalibrationError

__all__ = ["calibration_batches", "calibration_windows", "check_tokens", "iter_documents", "tokenize_document"]

logger = logging.getLogger(__name__)

TEXT_FIELDS = ("text", "content", "story", "document", "sentence")
TOKEN_FIELD = "input_ids"
SHUFFLE_BUFFER = 10_000
"""Documents held in memory to draw from in a random order; larger data sets are shuffled within this window."""
PIECE = 65_536
"""Characters: longer documents (a whole corpus in one txt file) are cut into pieces of about this size, at line ends,
so that calibration draws from all of the text."""
TOKENS_PER_BATCH = 2048
"""Short sequences of equal length are stacked until a forward pass has about this many tokens."""


def iter_documents(dataset: Any) -> Iterator[str | Tensor]:
    """Yield the documents of ``dataset``: strings, or int64 tensors [tokens] where it is tokenized already.

    Args:
        dataset: a string list; a list of token ids (lists, tensors or dicts with ``input_ids``); a `datasets` object;
            the path of a ``.txt``, ``.json`` or ``.jsonl`` file; or the name of a data set on the Hub, with an
            optional configuration and split: ``"name"``, ``"name:config"``, ``"name:config:split"``.

    Raises:
        CalibrationError: the data set cannot be found or an item has no text and no token ids.
    """
    if isinstance(dataset, str | os.PathLike):
        path = Path(dataset)
        yield from _read_file(path) if path.is_file() else _read_hub(str(dataset))
        return
    if isinstance(dataset, Mapping):
        if TOKEN_FIELD not in dataset and not hasattr(dataset, "features"):
            raise CalibrationError("dataset is a dict: pass one split of a DatasetDict, or a dict with 'input_ids'.")
        dataset = dataset[TOKEN_FIELD]
    if isinstance(dataset, Tensor):
        dataset = dataset if dataset.dim() > 1 else dataset[None]
    if not isinstance(dataset, Iterable):
        raise CalibrationError(
            f"dataset is a {type(dataset).__name__}: use a list of strings or token ids, a datasets object, the path"
            " of a json, jsonl or txt file, or the name of a data set on the Hub."
        )
    for index, item in enumerate(dataset):
        yield _document(item, index)


def tokenize_document(text: str, tokenizer: Any) -> list[int]:
    """Token ids of one document as the model saw documents in training.

    Special tokens are those that the tokenizer adds itself; where it adds none but has an end-of-text token, that
    token is put between documents.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    marked = ids and (ids[0] == bos or ids[-1] == eos) and not (bos is None and eos is None)
    if ids and not marked and eos is not None:
        ids.append(eos)
    return ids


def calibration_windows(
    dataset: Any, tokenizer: Any = None, *, nsamples: int = 128, seqlen: int = 2048, seed: int = 0
) -> list[Tensor]:
    """At most ``nsamples`` sequences of token ids, int64 [1, length] with ``length <= seqlen``.

    Strings are tokenized document by document in a random order (``seed``), joined, and cut into windows of exactly
    ``seqlen`` tokens, as GPTQ does. Token ids keep their boundaries: each item is cut into pieces of at most
    ``seqlen``. Where there is less data than asked for, what is there is used and a warning says how much that is.

    Raises:
        CalibrationError: no data, text without a tokenizer, or fewer than two tokens in all.
    """
    if dataset is None:
        raise CalibrationError(
            "No calibration data: pass dataset= (a list of strings, the path of a json, jsonl or txt file, a datasets"
            " object, or the name of a data set on the Hub)."
        )
    windows: list[Tensor] = []
    pool: list[int] = []
    for document in _shuffled(_pieces(iter_documents(dataset)), seed):
        if isinstance(document, str):
            if tokenizer is None:
                raise CalibrationError("dataset holds text: pass tokenizer= (an object or a name), or token ids.")
            pool.extend(tokenize_document(document, tokenizer))
            while len(pool) >= seqlen and len(windows) < nsamples:
                windows.append(torch.tensor(pool[:seqlen])[None])
                pool = pool[seqlen:]
        else:
            windows.extend(piece[None] for piece in document.split(seqlen) if piece.numel() > 1 or seqlen == 1)
        if len(windows) >= nsamples:
            return windows[:nsamples]
    if not windows and len(pool) > 1:
        windows.append(torch.tensor(pool)[None])
    if not windows:
        raise CalibrationError(
            "The calibration data has less than two tokens: nothing can be calibrated on it. Pass text, ideally"
            f" nsamples x seqlen = {nsamples * seqlen} tokens."
        )
    have, asked = sum(w.numel() for w in windows), nsamples * seqlen
    if have < asked:
        logger.warning(
            "The calibration data has %d tokens, where nsamples=%d and seqlen=%d ask for %d; all of it is used.",
            have, nsamples, seqlen, asked,
        )  # fmt: skip
    return windows


def calibration_batches(windows: Sequence[Tensor], tokens_per_batch: int = TOKENS_PER_BATCH) -> list[Tensor]:
    """Stack neighbouring windows of equal length into batches [n, length] of at most about ``tokens_per_batch``."""
    batches: list[list[Tensor]] = []
    for window in windows:
        length = window.shape[1]
        last = batches[-1] if batches else None
        if last and last[0].shape[1] == length and (len(last) + 1) * length <= tokens_per_batch:
            last.append(window)
        else:
            batches.append([window])
    return [torch.cat(batch) for batch in batches]


def check_tokens(model: Any, low: int, high: int) -> None:
    """Raise CalibrationError unless the token ids from ``low`` to ``high`` have a place in the model's embeddings."""
    embeddings = _embeddings(model) or _embeddings(getattr(model, "get_decoder", lambda: None)())  # CLIP: of its text
    size = getattr(embeddings, "num_embeddings", None)
    if size is not None and not 0 <= low <= high < size:
        raise CalibrationError(
            f"The data has token ids from {low} to {high}, the model has {size} embeddings (0 to {size - 1}): the"
            " tokenizer, or the data that was tokenized with it, belongs to another model."
        )


def _embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _document(item: Any, index: int) -> str | Tensor:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        if TOKEN_FIELD in item:
            return _tokens(item[TOKEN_FIELD], index)
        texts = [str(name) for name, value in item.items() if isinstance(value, str)]
        known = [name for name in TEXT_FIELDS if name in item]
        for name in known or (texts if len(texts) == 1 else ()):
            if name in texts:
                return str(item[name])
        if known:
            raise CalibrationError(f"Item {index} of the dataset has no text in {known[0]!r}: leave such items out.")
        found = f"several texts ({', '.join(sorted(texts))})" if texts else "no text and no input_ids"
        raise CalibrationError(
            f"Item {index} of the dataset has {found}: call the field that holds the text 'text'. Its fields are"
            f" {sorted(map(str, item))}."
        )
    return _tokens(item, index)


def _tokens(ids: Any, index: int) -> Tensor:
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"Item {index} of the dataset is neither text nor a list of token ids.") from error
    if tensor.dim() == 0:
        raise CalibrationError(f"Item {index} of the dataset is a single number: pass a list of lists of token ids.")
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise CalibrationError(f"Item {index} of the dataset is {tensor.dtype}: token ids must be integers.")
    return tensor.reshape(-1).to(device="cpu", dtype=torch.int64)


def _read_file(path: Path) -> Iterator[str | Tensor]:
    suffix = path.suffix.lower()
    try:
        if suffix in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8-sig") as lines:
                for index, line in enumerate(lines):
                    if line.strip():
                        yield _document(_parse(line, path, index), index)
        elif suffix == ".json":
            items = json.loads(path.read_text(encoding="utf-8-sig"))
            if isinstance(items, Mapping) and not isinstance(items.get("text"), str):
                items = next((value for value in items.values() if isinstance(value, list)), [items])
            for index, item in enumerate(items if isinstance(items, list) else [items]):
                yield _document(item, index)
        else:
            yield path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as {suffix[1:] or 'text'}: {error}") from error


def _parse(line: str, path: Path, index: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"{path} cannot be read: line {index + 1} is not JSON ({error.msg}, column {error.pos + 1})"
        ) from error


def _read_hub(name: str) -> Iterator[str | Tensor]:
    if Path(name).suffix.lower() in (".txt", ".json", ".jsonl", ".ndjson") or name.startswith((".", "/", "~")):
        found = "is a folder: give one of its files" if Path(name).is_dir() else "does not exist"
        raise CalibrationError(f"The data file {name} {found}.")
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{name!r} is not a file, so it is taken for a data set on the Hub, which needs the `datasets` package:"
            " pip install 'hf-spqr[datasets]'."
        ) from error
    repo, config, split = (name.split(":") + ["", ""])[:3]

    def items() -> Iterator[Any]:
        try:
            yield from datasets.load_dataset(repo, config or None, split=split or "train", streaming=True)
        except Exception as error:  # of any kind, and while it is read too
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CalibrationError(f"{name!r} is neither a file nor a data set that can be read: {why}") from error

    for index, item in enumerate(items()):
        yield _document(item, index)


def _pieces(documents: Iterable[str | Tensor]) -> Iterator[str | Tensor]:
    for document in documents:
        while isinstance(document, str) and len(document) > 2 * PIECE:
            cut = document.find("\n", PIECE) + 1 or PIECE
            yield document[:cut]
            document = document[cut:]
        yield document


def _shuffled(documents: Iterator[str | Tensor], seed: int) -> Iterator[str | Tensor]:
    """The documents in a random order that ``seed`` fixes, drawn from windows of ``SHUFFLE_BUFFER``."""
    generator = random.Random(seed)
    while buffer := list(islice(documents, SHUFFLE_BUFFER)):
        generator.shuffle(buffer)
        yield from buffer
