"""The arrows of docs/design.md run one way: what each part of the package may import."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_spqr"
MAY_IMPORT = {
    "errors": set(),
    "when_imported": set(),
    "formats": {"errors"},
    "ops": {"formats"},
    "methods": {"errors", "formats"},
    "calibration": {"errors"},
    "nn": {"errors", "formats", "ops"},
    "bench": {"formats", "nn"},
    "evaluate": {"calibration", "errors"},
    "config": {"errors", "formats", "methods"},
    "report": {"config", "errors", "nn"},
    "quantize": {"calibration", "config", "errors", "formats", "methods", "nn", "report"},
    "integrations": {
        *("calibration", "config", "errors", "formats", "methods", "nn", "quantize", "report"),
        "when_imported",
    },
}
KNOW_NO_TRANSFORMERS = ("errors", "when_imported", "formats", "ops", "methods", "calibration", "evaluate")


def imported(part: str) -> set[str]:
    """Modules that ``hf_spqr/part`` imports anywhere, by their full names."""
    files = sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    names: set[str] = set()
    for file in files:
        package = ["hf_spqr", *file.relative_to(PACKAGE).parts[:-1]]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) + 1 - node.level] if node.level else []
                module = ".".join([*above, *([node.module] if node.module else [])])
                names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_every_part_is_known() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert parts - {"__init__", "__pycache__", "cli"} == set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_arrows_run_one_way(part: str) -> None:
    found = {name.split(".")[1] for name in imported(part) if name.startswith("hf_spqr.")}
    assert found - {part} <= MAY_IMPORT[part]
    if part in KNOW_NO_TRANSFORMERS:
        assert not {name for name in imported(part) if name.split(".")[0] == "transformers"}
