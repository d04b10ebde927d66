"""Weights that are mapped from a file stay in memory after their last use, until the system needs the room.

They are not needed, but they count: a process that quantizes a large model looks as large as the model. Telling the
system keeps it small. No data can be lost by it: pages of a file are read again if someone asks for them.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

from torch import Tensor

__all__ = ["Span", "let_go", "span"]

Span = tuple[int, int]
"""First address and number of bytes."""

PAGE_OUT = 21
"""MADV_PAGEOUT of Linux 5.4: give these pages back now."""


def span(tensor: Tensor) -> Span | None:
    """Where a contiguous tensor lies in host memory; None for any other."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    return tensor.data_ptr(), tensor.nbytes


def let_go(spans: Sequence[Span | None]) -> None:
    """Give the pages of ``spans`` back to the system (on Linux; elsewhere, and where it refuses, nothing happens)."""
    if not sys.platform.startswith("linux"):
        return
    advise = ctypes.CDLL(None).madvise
    for each in spans:
        if each is None:
            continue
        start = -(-each[0] // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (each[0] + each[1] - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(length), PAGE_OUT)
