"""``hf-spqr eval --tasks``: lm-evaluation-harness, with the base model beside the quantized one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from hf_spqr.cli.common import (
    CommandError,
    Dtype,
    bold,
    check_writes_text,
    err_console,
    load_model,
    load_tokenizer,
    out_console,
)


def run_tasks(
    names: list[str],
    tasks: str,
    folder: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    dtype: Dtype,
    device: str | None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score the models ``names`` (the base first, if there are two) on ``tasks``, a list with commas.

    The result as a JSON object; with a base also the difference of every metric.
    """
    from hf_spqr.integrations.lm_eval import evaluate_tasks, find_tasks

    wanted = [task.strip() for task in tasks.split(",") if task.strip()]
    if not wanted:
        raise CommandError("--tasks: give names of lm-eval tasks with commas between them")
    for name in names:
        check_writes_text(name, trust_remote_code)
    manager = find_tasks(wanted, folder)
    results = []
    for name in names:
        err_console().print(f"evaluating {name}", markup=False, soft_wrap=True)
        tokenizer = load_tokenizer(name, trust_remote_code)
        model = load_model(name, dtype, device, trust_remote_code=trust_remote_code)
        found = evaluate_tasks(
            model, tokenizer, wanted, manager, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size
        )
        results.append({"model": name, "dtype": str(model.dtype).removeprefix("torch."), **found})
        del model
    data = results[-1]
    if len(results) > 1:
        data["base"] = results[0]
        for task, result in data["tasks"].items():
            before = results[0]["tasks"][task]["metrics"]
            result["difference"] = {key: value - before[key] for key, value in result["metrics"].items()}
    return data


def show_tasks(data: dict[str, Any]) -> None:
    """Print the table for people: every task by its usual metric."""
    from hf_spqr.integrations.lm_eval import main_metric

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("task", "metric"):
        table.add_column(name, overflow="fold")
    base = data.get("base")
    columns = ["samples", *(["base"] if base else []), "model", "stderr", *(["difference"] if base else [])]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for task, result in data["tasks"].items():
        metric = main_metric(result["metrics"])
        if not metric:
            continue
        error = result["stderr"].get(metric)
        row = [
            str(result["samples"] or "-"),
            *([f"{base['tasks'][task]['metrics'][metric]:.4f}"] if base else []),
            f"{result['metrics'][metric]:.4f}",
            "-" if error is None else f"{error:.4f}",
            *([f"{result['difference'][metric]:+.4f}"] if base else []),
        ]
        table.add_row(task, metric, *row)
    out_console().print(f"{bold(data['model'])}  lm-eval {data['lm_eval']}, {data['dtype']}")
    out_console().print(table)
