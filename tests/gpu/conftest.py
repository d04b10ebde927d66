"""Everything here needs a GPU and the CUDA extension; without them it is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_spqr import ops

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = "no GPU"
    elif not ops.COMPILED_CUDA:
        reason = f"hf_spqr._C_cuda is not there: {ops.WHY_NOT.get('_C_cuda')}"
    else:
        return
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
