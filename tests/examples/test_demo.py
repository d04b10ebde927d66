"""The demo from beginning to end, on little data."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
INSTALLED = any(point.name == "hf_spqr" for point in metadata.entry_points(group="torch.backends"))


@pytest.mark.skipif(not INSTALLED, reason="the demo loads without `import hf_spqr`, which needs an installed package")
def test_runs_and_prints_its_table(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "demo.py"),
        "--out",
        str(tmp_path / "q"),
        "--limit",
        "3",
        "--nsamples",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line[:38].strip(): line[38:].split() for line in done.stdout.splitlines() if len(line) == 64}
    before, after = rows["unquantized"], rows["SpQR 3 bit, groups of 16"]
    rounded = rows["round to nearest 3 bit, groups of 128"]
    assert float(before[0]) < float(after[0]) < float(rounded[0])
    assert 3.6 < float(after[1]) < 4.5
    assert "def read_file(path):" in done.stdout
    assert (tmp_path / "q/quantization_report.json").is_file()
