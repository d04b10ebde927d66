"""The oldest Transformers that this package works with, said before anything is missing in an older one."""

from __future__ import annotations

import transformers
from packaging.version import Version

__all__ = ["OLDEST", "check_transformers"]

OLDEST = "5.17"


def check_transformers() -> None:
    """Raise ImportError where an older Transformers is installed."""
    if Version(transformers.__version__).release < Version(OLDEST).release:
        raise ImportError(
            f"hf_spqr needs Transformers {OLDEST} or newer, and {transformers.__version__} is installed:"
            " pip install -U transformers"
        )
