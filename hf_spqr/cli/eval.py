"""``hf-spqr eval``: perplexity with the protocol stated."""

from __future__ import annotations

from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from hf_spqr.cli.common import (
    Backend,
    BackendOption,
    CommandError,
    DeviceOption,
    Dtype,
    JsonOption,
    ModelArgument,
    TrustOption,
    bold,
    check_model,
    check_writes_text,
    load_model,
    load_tokenizer,
    number_or_none,
    out_console,
    print_json,
    progress,
)
from hf_spqr.cli.tasks import run_tasks, show_tasks

PERPLEXITY, TASKS = "With --dataset: perplexity", "With --tasks: lm-eval"  # panels of --help


class Protocol(str, Enum):
    """The protocols of hf_spqr.evaluate."""

    per_document = "per-document"
    concatenated = "concatenated"
    sliding_window = "sliding-window"


def eval_command(
    model: ModelArgument,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", "-d", help="Text: a txt, json or jsonl file, or a Hub data set, name:config:split."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Instead of a text: tasks of lm-eval, for example arc_easy,piqa.")
    ] = None,
    protocol: Annotated[
        Protocol,
        typer.Option(
            "--protocol",
            help="per-document: each text on its own. concatenated: windows of --seqlen without overlap, as in the "
            "GPTQ, SpQR and OmniQuant papers. sliding-window: windows that move on by --stride.",
            rich_help_panel=PERPLEXITY,
        ),
    ] = Protocol.per_document,
    seqlen: Annotated[
        int | None,
        typer.Option(
            "--seqlen",
            help="Tokens per window. Default: the model's positions, at most 2048.",
            rich_help_panel=PERPLEXITY,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride", help="Step of the sliding window. Default: half of --seqlen.", rich_help_panel=PERPLEXITY
        ),
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option("--task-folder", help="A folder of task files (YAML) of your own.", rich_help_panel=TASKS),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", help="Examples in the context.", min=0, rich_help_panel=TASKS)
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="A second model to compare with, usually the unquantized one.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Use only the first N documents, of the text or of each task.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Windows per forward pass.", min=1)] = 8,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Data type of the activations and unpacked weights.")] = (
        Dtype.auto
    ),
    device: DeviceOption = None,
    backend: BackendOption = Backend.auto,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Measure a model, quantized or not: perplexity on a text, or lm-eval tasks.

    The protocol is part of the result: perplexities are comparable only under the same one. A quantized model's bits
    per weight are counted from its files. Tasks are run by lm-eval and give the numbers of its own command line.

    [bold]Examples[/bold]

      hf-spqr eval out/demo --dataset examples/demo-heldout.jsonl

      hf-spqr eval out/demo --base examples/demo-model \\
          -d examples/demo-heldout.jsonl --json

      hf-spqr eval out/demo -d wiki.txt --protocol sliding-window --stride 256

      hf-spqr eval out/model --base MODEL --tasks arc_easy,piqa,winogrande
    """
    from hf_spqr.calibration.data import iter_documents

    names = [model] if base is None else [base, model]
    for name in names:
        check_model(name)
    if (dataset is None) == (tasks is None):
        raise typer.BadParameter("give either --dataset, a text for perplexity, or --tasks, tasks of lm-eval")
    if tasks is not None:
        if backend is not Backend.auto or seqlen is not None or stride is not None:
            raise typer.BadParameter("--backend, --seqlen and --stride go with --dataset only")
        found = run_tasks(names, tasks, task_folder, num_fewshot, limit, batch_size, dtype, device, trust_remote_code)
        if json:
            print_json(found)
        else:
            show_tasks(found)
        return
    assert dataset is not None
    if task_folder is not None or num_fewshot is not None:
        raise typer.BadParameter("--task-folder and --num-fewshot go with --tasks only")
    for name in names:
        check_writes_text(name, trust_remote_code)
    documents = list(islice(iter_documents(dataset), limit))
    if not documents:
        raise CommandError(f"{dataset} has no documents")
    texts = [document if isinstance(document, str) else document.tolist() for document in documents]
    settings: dict[str, Any] = {
        "protocol": protocol.value,
        "seqlen": seqlen,
        "stride": stride,
        "batch_size": batch_size,
    }
    results = [measure(name, texts, settings, dtype, device, backend, trust_remote_code) for name in names]
    data: dict[str, Any] = {"dataset": dataset, **results[-1]}
    if base is not None:
        data["base"] = results[0]
        data["nll_increase"] = results[1]["nll"] - results[0]["nll"]
        data["perplexity_ratio"] = results[1]["perplexity"] / results[0]["perplexity"]
    if json:
        print_json(data)
    else:
        show(dataset, results)


def measure(
    model: str,
    texts: list[str | list[int]],
    settings: dict[str, Any],
    dtype: Dtype,
    device: str | None,
    backend: Backend,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Load, score and free one model; the result as a JSON object."""
    from hf_spqr.evaluate import perplexity

    tokenizer = load_tokenizer(model, trust_remote_code)
    loaded = load_model(model, dtype, device, backend, trust_remote_code)
    with progress(f"evaluating {model}") as advance:
        result = perplexity(loaded, tokenizer, texts, on_progress=advance, **settings)
    return {
        "model": model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "backend": backend.value,
        **checkpoint_bits(model, trust_remote_code),
        **result.to_dict(),
        "protocol_text": result.describe(),
    }


def checkpoint_bits(model: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Bits per weight and file size of a local safetensors checkpoint; nulls for others."""
    from hf_spqr.errors import CheckpointError
    from hf_spqr.report.checkpoint import inspect_checkpoint

    if Path(model).is_dir():
        try:
            totals = inspect_checkpoint(model, trust_remote_code).to_dict()["totals"]
            return {key: totals[key] for key in ("bits_per_weight", "model_bits_per_weight", "file_bytes")}
        except CheckpointError:
            pass
    return {"bits_per_weight": None, "model_bits_per_weight": None, "file_bytes": None}


def show(dataset: str, results: list[dict[str, Any]]) -> None:
    """Print the table for people."""
    console = out_console()
    console.print(f"{bold(dataset)}  {results[-1]['protocol_text']}")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model", overflow="fold")
    for name in ("perplexity", "mean of documents", "nll", "bits/weight", "dtype", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            escape(result["model"]),
            f"{result['perplexity']:.4f}",
            number_or_none(result["perplexity_documents"]),
            f"{result['nll']:.4f}",
            number_or_none(result["bits_per_weight"], 3),
            result["dtype"],
            f"{result['seconds']:.1f}",
        )
    console.print(table)
