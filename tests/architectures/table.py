"""Writes the table of docs/architectures.md: ``python -m tests.architectures.table``.

Every check of the matrix is run anew; what fails is written down as failing, with the exception.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
import transformers

from tests.architectures.matrix import ARCHITECTURES, METHODS, Architecture, check

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
START, END = "<!-- table: python -m tests.architectures.table -->", "<!-- end of table -->"


def documented(text: str) -> list[str]:
    """The model types that the table in ``text`` lists, in its order."""
    table = text.partition(START)[2].partition(END)[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def cell(architecture: Architecture, method: str) -> str:
    """What came out for one architecture and method."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = check(architecture, method, Path(folder))
        except Exception as error:
            reason = str(error).partition("\n")[0][:80]
            return f"fails: {type(error).__name__} {reason}".strip().replace("|", "/")
    return f"yes, {outcome.packed} packed, {outcome.skipped} left"


def make_table() -> str:
    """The table in Markdown."""
    lines = [f"| model type | kind | {' | '.join(METHODS)} |", f"|---|---|{'---|' * len(METHODS)}"]
    for architecture in ARCHITECTURES:
        cells = [cell(architecture, method) for method in METHODS]
        lines.append(f"| `{architecture.kind}` | {architecture.group} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(START)
    text = f"{before}{START}\nTransformers {transformers.__version__}\n\n{make_table()}\n{END}{rest.partition(END)[2]}"
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
