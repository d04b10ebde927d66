"""``torchrun ... hf-spqr quantize``: one command that several processes run together."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_spqr.quantize.ranks import Ranks

__all__ = ["is_shown_elsewhere", "local_device", "process_group"]


@contextmanager
def process_group() -> Iterator[Ranks]:
    """The processes that torchrun has started, joined for a while; without torchrun there is one."""
    import torch.distributed as dist

    from hf_spqr.quantize.ranks import Ranks

    starts = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized()
    with _stdout_kept_clear() if starts else nullcontext():
        if starts:
            dist.init_process_group("gloo")
        ranks = Ranks()
        try:
            yield ranks
        finally:
            ranks.close()
            if starts:
                dist.destroy_process_group()


@contextmanager
def _stdout_kept_clear() -> Iterator[None]:
    """What is printed meanwhile goes to stderr: gloo of torch 2.10 says on stdout who is connected."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def local_device(device: str | None) -> str | None:
    """``device``, where "cuda" is the GPU of this process: torchrun starts one for each."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def is_shown_elsewhere(error: BaseException) -> bool:
    """Whether the first process shows ``error``, and this is another one."""
    return bool(getattr(error, "everywhere", False)) and os.environ.get("RANK", "0") != "0"
