"""The table in docs/status.md: a row for every architecture of the matrix, a cell for every method."""

from __future__ import annotations

import re
from pathlib import Path

import transformers
from packaging.version import Version

from tests.architectures.matrix import METHODS
from tests.architectures.rows import ARCHITECTURES

DOCUMENT = Path(__file__).parents[2] / "docs" / "status.md"
COMMAND = "pytest tests/architectures --write-table"
START, END = f"<!-- table: {COMMAND} -->", "<!-- end of table -->"
HEAD = f"| model type | kind | {' | '.join(METHODS)} |\n|---|---|{'---|' * len(METHODS)}"

AS_WRITTEN = Version(transformers.__version__) >= Version("5.23")
"""Whether this is the Transformers with which the table is written, or a newer one."""

Cells = dict[tuple[str, str], str]
"""What came out, by model type and method."""


def read(text: str) -> Cells:
    """The cells of the table in ``text``, in its order."""
    table = text.partition(START)[2].partition(END)[0]
    rows = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| (.+) \|$", table, re.MULTILINE)
    return {(kind, method): cell for kind, row in rows for method, cell in zip(METHODS, row.split(" | "), strict=True)}


def render(cells: Cells) -> str:
    """The table in Markdown: the architectures of the matrix, in its order, "not run" where there is no cell."""
    lines = [HEAD]
    for architecture in ARCHITECTURES:
        row = [cells.get((architecture.kind, method), "not run") for method in METHODS]
        lines.append(f"| `{architecture.kind}` | {architecture.group} | {' | '.join(row)} |")
    return "\n".join(lines)


def replace(text: str, cells: Cells) -> str:
    """``text`` with the table of ``cells``."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{render(cells)}\n{END}{rest.partition(END)[2]}"


class Documented:
    """The table as it is committed, and what the tests of this run found."""

    def __init__(self, cells: Cells, write: bool) -> None:
        self.cells, self.write = cells, write

    def enter(self, kind: str, method: str, cell: str) -> None:
        """Note an outcome, or compare it with the document's, but for an older Transformers: it may have other
        modules (a linear layer for the router of Jamba, experts of a shape of their own in Aria)."""
        if self.write:
            self.cells[kind, method] = cell
        elif AS_WRITTEN:
            found = self.cells.get((kind, method))
            assert cell == found, f"{DOCUMENT.name} has {found!r} for {kind} and {method}: run `{COMMAND}`"
