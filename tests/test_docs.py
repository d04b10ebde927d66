"""The pages hang together: links lead somewhere, and Python snippets are complete."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for pattern in ("*.md", "docs/*.md", "examples/*/*.md") for page in ROOT.glob(pattern))
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """As GitHub names the headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_use_nothing_that_was_not_imported(page: Path) -> None:
    """In a snippet or in an earlier one of the page."""
    known, unknown = set(dir(builtins)), set()
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "python":
            continue
        nodes = list(ast.walk(ast.parse(code)))
        imports = [name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names]
        known |= {(name.asname or name.name).partition(".")[0] for name in imports}
        names = [node for node in nodes if isinstance(node, ast.Name)]
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        unknown |= {node.id for node in names} - known
    assert unknown == set()
