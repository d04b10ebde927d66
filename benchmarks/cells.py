"""What tables of perplexities share: arguments, texts that calibrate and texts that are scored, cells of results."""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine
from hf_spqr.calibration.data import iter_documents

Row = dict[str, Any]


def argument_parser(description: str | None) -> ArgumentParser:
    """Of a program that takes a model and its texts, none of them where it only prints what is there."""
    made = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("model", nargs="?", help="folder of the model")
    made.add_argument("calibration", nargs="?", help="txt, json or jsonl")
    made.add_argument("heldout", nargs="?", help="txt, json or jsonl")
    return made


def texts(calibration: str, heldout: str, documents: int) -> tuple[list[str], list[str]]:
    """The texts of ``calibration`` that are not scored, and the last ``documents`` of ``heldout``, which are."""
    scored = [text for text in iter_documents(heldout) if isinstance(text, str)][-documents:]
    kept_out = set(scored)
    return [text for text in iter_documents(calibration) if isinstance(text, str) and text not in kept_out], scored


class Cells:
    """benchmarks/results/<name>.json, written anew after each row, so that a run may be stopped and goes on.

    settings: what all rows have in common. start: what else a new file says, called where there is none.
    Raises ValueError where the file was made with other settings.
    """

    def __init__(self, name: str, settings: dict[str, Any], start: Callable[[], dict[str, Any]]) -> None:
        self.name = name
        result = self._read()
        if any(result.get(key) != value for key, value in settings.items() if result):
            raise ValueError(f"{self.path} was made with other settings; move it away first")
        self.head = {key: value for key, value in result.items() if key not in ("date", "machine", "rows")}
        self.head = self.head or {**start(), **settings}

    @property
    def path(self) -> Path:
        return machine.RESULTS / f"{self.name}.json"

    @property
    def rows(self) -> list[Row]:
        """What is in the file now: another process may be adding to it too."""
        return self._read().get("rows", [])

    def known(self, **key: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, row: Row) -> None:
        """Show the row and write the file."""
        print("  ".join(f"{x:.5g}" if isinstance(x, float) else str(x) for x in row.values()), flush=True)
        machine.save(self.name, {**self.head, "rows": [*self.rows, row]})

    def _read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}
