"""Writes the tables of docs/cpu.md from the results of the benchmarks of the CPU, and draws docs/cpu.svg.

    python benchmarks/kernels_cpu_table.py [--processor amd-epyc]

The plot, of batch 1 and the first shape, needs matplotlib (`pip install 'hf-spqr[plot]'`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from machine import RESULTS, file_name, machine

Row = dict[str, Any]
DOCS = Path(__file__).parents[1] / "docs"
OURS = ("spqr", "affine")


def load(kind: str, processor: str) -> list[Row]:
    path = RESULTS / f"{kind}-{processor}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def distinct(rows: list[Row], *keys: str) -> list[tuple]:
    """Values of ``keys`` in order of size."""
    return sorted({tuple(tuple(row[k]) if k == "shape" else row[k] for k in keys) for row in rows})


def one(rows: list[Row], **values: Any) -> Row | None:
    for row in rows:
        if all(row[key] == (list(value) if key == "shape" else value) for key, value in values.items()):
            return row
    return None


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, body)])


def bits(row: Row) -> float:
    n, k = row["shape"]
    return 8 * row["bytes"] / n / k


def of_read(row: Row) -> float:
    return row["bytes"] / row["seconds"] / row["read_bytes_per_second"]


def names(rows: list[Row]) -> list[str]:
    """Ours, torch's, the others'; the plain read is no layer."""
    found = [name for name in dict.fromkeys(row["name"] for row in rows) if name != "read"]
    return sorted(found, key=lambda name: (not name.startswith(OURS), not name.startswith("torch")))


def batch_one(rows: list[Row]) -> str:
    """Microseconds and the share of the bandwidth, for each shape and number of threads.

    Without the candidates that may round activations: for one token they run the exact kernel.
    """
    rows = [row for row in rows if row["tokens"] == 1 and not row["name"].endswith(" int8")]
    settings = distinct(rows, "shape", "threads")
    head = ["", "bits"] + [f"{n} × {k}, {t} thread{'s' if t > 1 else ''}" for (n, k), t in settings]
    body = []
    for name in names(rows):
        found = [one(rows, name=name, shape=shape, threads=t) for shape, t in settings]
        width = next(f"{bits(row):.2f}" for row in found if row)
        body.append([name, width] + [f"{r['seconds'] * 1e6:.0f} ({of_read(r):.0%})" if r else "–" for r in found])
    return table(head, body)


def more_tokens(rows: list[Row]) -> str:
    """Times faster than torch's bfloat16, for each number of tokens and threads."""
    first = distinct(rows, "shape")[0][0]
    rows = [row for row in rows if row["tokens"] > 1 and tuple(row["shape"]) == first]
    settings = distinct(rows, "tokens", "threads")
    head = [""] + [f"{tokens} tokens, {t} thread{'s' if t > 1 else ''}" for tokens, t in settings]
    body = []
    for name in names(rows):
        cells = [name]
        for tokens, t in settings:
            row, bf16 = (one(rows, name=n, tokens=tokens, threads=t) for n in (name, "torch bf16"))
            cells.append(f"{bf16['seconds'] / row['seconds']:.2f}" if row and bf16 else "–")
        body.append(cells)
    return table(head, body)


def whole_models(rows: list[Row]) -> str:
    head = ["", "", "threads", "GiB", "tokens/s", "× bf16", "of limit", "first token of 512, s", "× bf16"]
    body = []
    for row in rows:
        setting = {key: row[key] for key in ("model", "threads", "compiled")}
        bf16 = one(rows, kind="bf16", **setting)
        assert bf16 is not None
        seconds, first = row["seconds_per_token"], row["seconds_to_first_of_512"]
        limit = row["read_per_token_bytes"] / row["read_bytes_per_second"]
        body.append([
            row["model"] + (", compiled" if row["compiled"] else ""), row["kind"], str(row["threads"]),
            f"{row['weight_bytes'] / 2**30:.2f}", f"{1 / seconds:.1f}", f"{bf16['seconds_per_token'] / seconds:.2f}",
            f"{limit / seconds:.0%}", f"{first:.1f}" if first else "–",
            f"{first / bf16['seconds_to_first_of_512']:.2f}" if first else "–",
        ])  # fmt: skip
    return table(head, body)


def pages(rows: list[Row]) -> str:
    """Gain over the mapped file as safetensors writes it."""
    settings = distinct(rows, "kind", "threads")
    head = ["", *(f"{kind}, {t} thread{'s' if t > 1 else ''}" for kind, t in settings), "ready after, s", "own memory"]
    body = []
    for way in dict.fromkeys(row["way"] for row in rows):
        found = [one(rows, way=way, kind=kind, threads=t) for kind, t in settings]
        plain = [one(rows, way="mapped, 8 bytes", kind=kind, threads=t) for kind, t in settings]
        both = zip(found, plain, strict=True)
        gains = [f"{b['seconds'] / a['seconds'] - 1:+.1%}" if a and b else "–" for a, b in both]
        known = [row for row in found if row]
        ready = max(row["load_seconds"] for row in known)
        body.append([way, *gains, f"{ready:.3f}", f"{max(row['anonymous_bytes'] for row in known) / 1e6:.0f} MB"])
    return table(head, body)


def fused(rows: list[Row]) -> str:
    """What one call saves."""
    settings = distinct(rows, "kind", "threads")
    head = ["", *(f"{kind}, {t} thread{'s' if t > 1 else ''}" for kind, t in settings)]
    body = []
    for layers in dict.fromkeys(row["layers"] for row in rows):
        found = [one(rows, layers=layers, kind=kind, threads=t) for kind, t in settings]
        cells = [f"{1 - row['seconds_of_one'] / row['seconds_of_several']:.1%}" if row else "–" for row in found]
        body.append([f"{layers}: {' + '.join(map(str, next(row['rows'] for row in found if row)))} rows", *cells])
    return table(head, body)


def int8(rows: list[Row]) -> str:
    """Times faster than torch's bfloat16, exact and with activations rounded to int8."""
    tokens = [t for (t,) in distinct(rows, "tokens")]
    body = []
    for (threads,) in distinct(rows, "threads"):
        for name in dict.fromkeys(row["name"].removesuffix(" int8") for row in rows if row["name"].endswith(" int8")):
            cells = [name, str(threads)]
            for count in tokens:
                setting = {"threads": threads, "tokens": count}
                found = [one(rows, name=n, **setting) for n in ("torch bf16", name, f"{name} int8")]
                seconds = [row["seconds"] for row in found if row]
                whole = len(seconds) == len(found)
                cells.append(f"{seconds[0] / seconds[1]:.2f} → {seconds[0] / seconds[2]:.2f}" if whole else "–")
            body.append(cells)
    return table(["", "threads", *(f"{count} tokens" for count in tokens)], body)


def int8_perplexity() -> str:
    rows = json.loads((RESULTS / "int8_perplexity.json").read_text())["rows"]
    body = []
    for row in rows:
        exact, rounded = row["exact"], row["int8"]
        body.append([row["model"], row["name"], f"{exact:.4f}", f"{rounded:.4f}", f"{rounded / exact - 1:+.2%}"])
    return table(["", "", "exact", "int8", "increase"], body)


def put(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the marks of ``name``."""
    start, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, found, rest = page.partition(start)
    if not found or end not in rest:
        raise SystemExit(f"docs/cpu.md has no place for {name!r}")
    return before + start + text + "\n" + rest[rest.index(end) :]


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hf_spqr"
    from matplotlib import pyplot

    shape = distinct(rows, "shape")[0][0]
    rows = [row for row in rows if row["tokens"] == 1 and tuple(row["shape"]) == shape and row["name"] != "read"]
    rows = [row for row in rows if bits(row) < 10]
    threads = [t for (t,) in distinct(rows, "threads")]
    figure, axes = pyplot.subplots(1, len(threads), figsize=(5.5 * len(threads), 4.5), squeeze=False)
    for count, axis in zip(threads, axes[0], strict=True):
        here = [row for row in rows if row["threads"] == count]
        per_bit = 1e6 * shape[0] * shape[1] / 8 / median(row["read_bytes_per_second"] for row in here)
        axis.plot([0, 6], [0, 6 * per_bit], color="0.6", linewidth=1, label="reading the weights, nothing else")
        for ours, label in ((True, "hf_spqr"), (False, "others")):
            chosen = [row for row in here if row["name"].startswith(OURS) == ours]
            x, y = [bits(row) for row in chosen], [row["seconds"] * 1e6 for row in chosen]
            axis.scatter(x, y, s=26, color="tab:blue" if ours else "none", edgecolor="tab:blue" if ours else "0.3",
                         label=label, zorder=3)  # fmt: skip
            for row, at, above in zip(chosen, x, y, strict=True):
                axis.annotate(row["name"], (at, above), xytext=(-4 if ours else 4, 2), textcoords="offset points",
                              fontsize=6, ha="right" if ours else "left")  # fmt: skip
        axis.set_ylim(0, 3 * 4 * per_bit)
        axis.set_xlim(1.4, 6)
        axis.set_xlabel("bits per weight")
        axis.set_ylabel("µs per call")
        axis.set_title(f"{shape[0]} × {shape[1]}, batch 1, {count} thread{'s' if count > 1 else ''}", fontsize=9)
        axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processor", default=file_name("", machine()["processor"])[1:], help="of the file")
    args = parser.parse_args()
    rows = load("kernels_cpu", args.processor)
    if not rows:
        raise SystemExit(f"benchmarks/results has no kernels_cpu-{args.processor}.json: run kernels_cpu.py first")
    page = (DOCS / "cpu.md").read_text()
    page = put(page, "batch 1", batch_one(rows))
    if any(row["tokens"] > 1 for row in rows):
        page = put(page, "more tokens", more_tokens(rows))
    for kind, make in (
        ("generate_cpu", whole_models),
        ("pages_cpu", pages),
        ("fused_cpu", fused),
        ("int8_activations", int8),
    ):
        found = load(kind, args.processor)
        if found:
            page = put(page, kind, make(found))
    page = put(page, "int8 perplexity", int8_perplexity())
    (DOCS / "cpu.md").write_text(page)
    draw(rows, DOCS / "cpu.svg")
    print("wrote", DOCS / "cpu.md", "and", DOCS / "cpu.svg")


if __name__ == "__main__":
    main()
