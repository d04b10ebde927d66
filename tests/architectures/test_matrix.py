"""Quantize, save, reload, generate and dequantize on every architecture, with every method."""

import pytest

from tests.architectures.matrix import ARCHITECTURES, METHODS, Architecture, check
from tests.architectures.table import DOCUMENT, documented

CASES = [
    pytest.param(
        architecture, method, id=f"{architecture.kind}-{method}", marks=[pytest.mark.slow][: architecture.slow]
    )
    for architecture in ARCHITECTURES
    for method in METHODS
]


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_architecture(architecture: Architecture, method: str, tmp_path):
    outcome = check(architecture, method, tmp_path)
    assert outcome.packed >= 4


def test_the_document_lists_every_architecture():
    """Run ``python -m tests.architectures.table`` after a change of the matrix."""
    assert documented(DOCUMENT.read_text(encoding="utf-8")) == [architecture.kind for architecture in ARCHITECTURES]
