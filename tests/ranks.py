"""Runs a function in several processes that form a gloo group, as torchrun would."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], *arguments: Any, size: int = 2, timeout: float = 150) -> list[Any]:
    """``function(*arguments)`` on every rank; returns what each returned.

    ``function`` is one of a module, as are the arguments' classes. Fails with the traceback of the first rank that
    fails, and when not all are done after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_work, args=(function, arguments, rank, size, folder, timeout), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in late:
            processes[rank].kill()
            processes[rank].join()
        results = []
        for rank in range(size):
            path = Path(folder, f"{rank}.pt")
            result, error = torch.load(path, weights_only=False) if path.exists() else (None, "died without a word")
            assert rank not in late, f"rank {rank} did not end"
            assert error is None, f"rank {rank}:\n{error}"
            results.append(result)
        return results


def _work(function: Callable[..., Any], arguments: tuple, rank: int, size: int, folder: str, timeout: float) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    result = error = None
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    try:
        result = function(*arguments)
    except BaseException:
        error = traceback.format_exc()
    torch.save((result, error), Path(folder, f"{rank}.pt"))
    if error is None:
        dist.destroy_process_group()
