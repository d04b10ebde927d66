"""The tokenizer of a model, loaded when calibration text asks for it and not before."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

from hf_spqr.errors import CalibrationError

__all__ = ["find_tokenizer", "tokenizer_beside"]

NONE_THERE = (OSError, ValueError, TypeError)
"""What AutoTokenizer raises for a folder without a tokenizer, depending on the kind of model."""
CANNOT = (*NONE_THERE, ImportError)
"""And what, where a package is missing that the tokenizer needs."""


def tokenizer_beside(model: Any) -> Any:
    """The tokenizer of the folder or repository that ``model`` came from; None where there is none."""
    try:
        return _load_beside(model)
    except NONE_THERE:
        return None


def find_tokenizer(model: Any, given: Any = None) -> Any:
    """The tokenizer ``given`` (an object, a folder or a name on the Hub); None for the one beside ``model``.

    That is loaded when it is first used, which raises CalibrationError where it cannot be: token ids need none. Raises
    CalibrationError at once where ``given`` is no tokenizer.
    """
    if given is None:
        return WaitingTokenizer(model)
    found, why = given, ""
    if isinstance(given, str | os.PathLike):
        try:
            found = _load(given, False)
        except CANNOT as error:
            found, why = None, f" ({error})"
    if not callable(found):
        raise CalibrationError(f"tokenizer={given!r} is no tokenizer, nor the name of one that can be loaded.{why}")
    return found


class WaitingTokenizer:
    """Stands for the tokenizer beside ``model`` and is loaded when it is first used."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @cached_property
    def _loaded(self) -> Any:
        why = ""
        try:
            tokenizer = _load_beside(self._model)
        except CANNOT as error:
            tokenizer, why = None, f" The one beside the model cannot be loaded: {error}"
        if tokenizer is None:
            raise CalibrationError(f"dataset holds text: pass tokenizer= (an object or a name), or token ids.{why}")
        return tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded, name)


def _load_beside(model: Any) -> Any:
    # custom code of the tokenizer is trusted where that of the model, from the same place, already runs
    trusted = type(model).__module__.startswith("transformers_modules.")
    return _load(getattr(model, "name_or_path", None), trusted)


def _load(name: str | os.PathLike[str] | None, trusted: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, trust_remote_code=trusted) if name else None
