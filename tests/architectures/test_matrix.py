"""Quantize, save, reload, generate and dequantize on every architecture, with every method.

The outcomes are the table in docs/status.md: ``--write-table`` writes it, without it every test compares its cell.
"""

from pathlib import Path

import pytest

from hf_spqr import UnsupportedLayerError
from tests.architectures.matrix import METHODS, check
from tests.architectures.rows import ARCHITECTURES, Architecture
from tests.architectures.table import DOCUMENT, Documented, read, render, replace

CASES = [
    pytest.param(
        architecture, method, id=f"{architecture.kind}-{method}", marks=[pytest.mark.slow][: architecture.slow]
    )
    for architecture in ARCHITECTURES
    for method in METHODS
]


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_architecture(architecture: Architecture, method: str, tmp_path: Path, documented: Documented):
    if method == "OmniQuant" and not architecture.chain:
        with pytest.raises(UnsupportedLayerError, match=r"one block after the other.* Try SpQR"):
            check(architecture, method, tmp_path)
        documented.enter(architecture.kind, method, "refused")
        return
    try:
        outcome = check(architecture, method, tmp_path)
    except Exception as error:
        if documented.write:
            documented.enter(architecture.kind, method, f"fails: {type(error).__name__}")
        raise
    assert outcome.packed >= 4
    documented.enter(architecture.kind, method, f"{outcome.packed} packed, {outcome.skipped} left")


def test_the_document_has_the_rows_of_the_matrix():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert render(read(text)) in text
    assert len(read(text)) == len(ARCHITECTURES) * len(METHODS) >= 2 * 25


def test_the_table_is_read_as_it_is_written():
    text = DOCUMENT.read_text(encoding="utf-8")
    cells = {**read(text), ("llama", "SpQR"): "fails: ValueError"}
    changed = replace(text, cells)
    assert read(changed) == cells and "| `llama` | decoder | fails: ValueError |" in changed
    assert replace(changed, read(text)) == text
    assert "not run" in render({})
