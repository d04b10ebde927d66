"""``torchrun ... hf-spqr quantize``: one command that several processes run together."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_spqr.quantize.ranks import Ranks

__all__ = ["is_shown_elsewhere", "local_device", "process_group"]


@contextmanager
def process_group() -> Iterator[Ranks]:
    """The processes that torchrun has started, joined for a while; without torchrun there is one.

    torchrun ends the others by a signal when one has failed: that becomes an exit like any other, so that unfinished
    folders are removed.
    """
    import torch.distributed as dist

    from hf_spqr.quantize.ranks import Ranks

    starts = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized()
    if starts:
        signal.signal(signal.SIGTERM, _stop)
        dist.init_process_group("gloo")
    ranks = Ranks()
    try:
        yield ranks
    finally:
        ranks.close()
        if starts:
            dist.destroy_process_group()


def local_device(device: str | None) -> str | None:
    """``device``, where "cuda" is the GPU of this process: torchrun starts one for each."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def is_shown_elsewhere(error: BaseException) -> bool:
    """Whether the first process shows ``error``, and this is another one."""
    return bool(getattr(error, "everywhere", False)) and os.environ.get("RANK", "0") != "0"


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)
