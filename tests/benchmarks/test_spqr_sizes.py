"""The table of sizes: what it calls chosen is what target_bits chooses, and each cell has its line and column."""

from __future__ import annotations

import pytest

from benchmarks import spqr_sizes
from hf_spqr.config import SpQRConfig
from hf_spqr.quantize.size import Matrices, choose


@pytest.mark.parametrize("size", spqr_sizes.WAYS)
def test_what_is_called_chosen_is_chosen(size: float) -> None:
    config = SpQRConfig(target_bits=size)
    choose(config, [[Matrices("wide", (4096, 4096), 1, 0)]])
    assert (config.bits, config.group_size) == spqr_sizes.WAYS[size][spqr_sizes.CHOSEN]
    assert not {"bits", "group_size"} & spqr_sizes.method(size, spqr_sizes.CHOSEN).settings.keys()


def test_table() -> None:
    def row(size: str, method: str, seed: int, divergence: float, nominal: float) -> dict[str, object]:
        return {"size": size, "method": method, "seed": seed, "divergence": divergence, "nominal": nominal}

    rows = [
        row("2.5", "chosen", 0, 0.3, 2.49),
        row("2.5", "chosen", 1, 0.1, 2.51),
        row("4.16", "fewer bits", 0, 1, 4.1),
    ]
    lines = spqr_sizes.table([{"model": "some", "rows": rows}]).splitlines()
    assert "| some | 2.5 | 200.00 (2/32, 2.50) | – | – |" in lines
    assert "| some | 4.16 | – | – | 1000.00 (3/16, 4.10) |" in lines
