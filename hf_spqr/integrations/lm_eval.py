"""lm-evaluation-harness on models in memory: the tasks, the scoring and the numbers are its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_spqr.errors import ConfigError

__all__ = ["evaluate_tasks", "find_tasks", "main_metric"]

FIRST = ("acc_norm", "acc", "exact_match", "word_perplexity", "perplexity", "byte_perplexity")
"""Metrics by which a task is usually reported, in the order of choice."""


def find_tasks(tasks: Sequence[str], folder: str | os.PathLike[str] | None = None) -> Any:
    """lm-eval's ``TaskManager``, which knows ``tasks``; before a model is loaded, for loading may take long.

    folder: a folder of task files (YAML) besides lm-eval's own tasks, e.g. with local data for a machine without
    network. Paths of data in them are relative to the working directory, as for lm-eval.

    Raises ImportError without lm-eval, ConfigError for an unknown task or a folder that does not exist.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"evaluating on tasks needs lm-eval: pip install hf-spqr[eval] ({error})") from error
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"{folder} is no folder of task files.")
    manager = None
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(
            f"lm-eval knows no task {unknown[0]!r}: `lm-eval ls tasks` lists its own, --task-folder adds."
        )
    return manager


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    manager: Any,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Run ``tasks``, which ``manager`` of :func:`find_tasks` knows, on ``model``, as ``lm-eval run`` would.

    Returns ``{"lm_eval": version, "tasks": {task: {"version", "num_fewshot", "samples", "metrics": {name: value},
    "stderr": {name: value}}}}``.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    names = dict.fromkeys(name for task in tasks for name in manager.match_tasks([task]))  # patterns such as arc_*
    found: Any = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(names),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return {
        "lm_eval": metadata.version("lm-eval"),
        "tasks": {task: _result(task, found) for task in found["results"]},
    }


def main_metric(metrics: Mapping[str, float]) -> str:
    """The metric by which a task is usually reported."""
    return next((name for name in FIRST if name in metrics), next(iter(metrics), ""))


def _result(task: str, found: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in found["results"][task].items():
        name, _, filtered = key.partition(",")
        if isinstance(value, bool) or not isinstance(value, int | float) or not filtered:
            continue
        name = name if filtered == "none" else f"{name}_{filtered}"
        if name.endswith("_stderr"):
            errors[name.removesuffix("_stderr")] = float(value)
        else:
            values[name] = float(value)
    samples = found.get("n-samples", {}).get(task, {})
    return {
        "version": found.get("versions", {}).get(task),
        "num_fewshot": found.get("n-shot", {}).get(task),
        "samples": samples.get("effective"),
        "metrics": values,
        "stderr": errors,
    }
