"""The option that lets the tests of the matrix write the table in docs/status.md instead of comparing with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.architectures.table import DOCUMENT, Documented, read, replace


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help=f"write the table of {DOCUMENT.name} (without -n)")


@pytest.fixture(scope="module")
def documented(request: pytest.FixtureRequest) -> Iterator[Documented]:
    text = DOCUMENT.read_text(encoding="utf-8")
    table = Documented(read(text), request.config.getoption("write_table", False))
    yield table
    if table.write:
        DOCUMENT.write_text(replace(text, table.cells), encoding="utf-8")
