"""Fixtures that many tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import byte_tokenizer, tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    lines = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs."
    return [lines[i:] + lines[:i] for i in range(0, 80, 10)]


@pytest.fixture
def model_dir(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny model with its tokenizer to a folder and returns the path."""

    def make(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        path = tmp_path / f"base_{kind}"
        tiny_model(kind, dtype, **changes).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder ``shared`` beside the checkout, with models and texts that are not part of the repository."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("no shared folder beside the checkout")
    return path


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
