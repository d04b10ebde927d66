"""What the numbers of a benchmark belong to: processor, cores, memory, library versions; and memory of a process."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

from hf_spqr.report import library_versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine and the libraries."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "versions": library_versions(),
    }


def memory() -> dict[str, int]:
    """Bytes of this process in memory: all, anonymous (its own), of these in huge pages, and mapped from files (the
    system may drop them)."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    own = fields["Anonymous"]
    resident, huge = fields["Rss"], fields["AnonHugePages"]
    return {"resident": resident, "anonymous": own, "huge": huge, "mapped": resident - own}


def peak_resident() -> int:
    """Highest resident memory of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def file_name(kind: str, *what: str) -> str:
    """``kind`` and what it was measured on, as the name of a result."""
    return f"{kind}-{re.sub(r'[^a-z0-9]+', '-', ' '.join(what).lower()).strip('-')}"


def merge(name: str, rows: list[dict[str, Any]], setting: tuple[str, ...]) -> list[dict[str, Any]]:
    """``rows``, each with the date of today, and before them those of the result ``name`` in other settings.

    setting: the keys of a row that say what was measured.
    """
    stamp = time.strftime("%Y-%m-%d", time.gmtime())
    measured = [[row[key] for key in setting] for row in rows]
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in old if [row.get(key) for key in setting] not in measured]
    return kept + [{**row, "date": stamp} for row in rows]


def save(name: str, result: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json``; return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    stamp = time.strftime("%Y-%m-%d", time.gmtime())
    path.write_text(json.dumps({"date": stamp, "machine": machine(), **result}, indent=1) + "\n")
    return path
