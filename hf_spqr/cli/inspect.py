"""``hf-spqr inspect``: what is in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hf_spqr.cli.common import (
    JsonOption,
    ModelArgument,
    TrustOption,
    bold,
    check_model,
    number_or_none,
    out_console,
    print_json,
    size_of,
)
from hf_spqr.report.checkpoint import CheckpointReport, PackedLayer, inspect_checkpoint
from hf_spqr.report.records import REPORT_NAME

PATTERNS = ["config.json", "*.safetensors", REPORT_NAME]


def inspect_command(
    model: ModelArgument,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", help=f"Also write the per-layer table of {REPORT_NAME} as CSV to this file."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw errors and bits per layer into this png, svg or pdf file.")
    ] = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Show every packed layer of a checkpoint: shape, bits, outliers, error, bytes; and the totals.

    Reads only the headers of the safetensors files: no weights, no model, whatever its size. Bits per
    weight are counted from bytes. Errors are there when the checkpoint has its quantization_report.json.

    [bold]Examples[/bold]

      hf-spqr inspect out/demo

      hf-spqr inspect out/demo --json | jq .totals.bits_per_weight

      hf-spqr inspect out/demo --plot layers.png --csv layers.csv
    """
    check_model(model)
    folder = local_folder(model, trust_remote_code)
    report = inspect_checkpoint(folder, trust_remote_code)
    report.source = model
    if csv is not None or plot is not None:
        write_extras(folder, csv, plot)
    if json:
        print_json(report.to_dict())
    else:
        show(report)


def local_folder(model: str, trust_remote_code: bool = False) -> Path:
    """The folder itself, or the Hub's files fetched into the cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=[*PATTERNS, *(["*.py"] if trust_remote_code else [])]))


def write_extras(folder: Path, csv: Path | None, plot: Path | None) -> None:
    """Write CSV and plot from the report beside the weights."""
    from hf_spqr.cli.common import CommandError
    from hf_spqr.report.plot import plot_report
    from hf_spqr.report.records import QuantizationReport
    from hf_spqr.report.table import to_csv

    written = QuantizationReport.load(folder)
    if written is None:
        raise CommandError(f"{folder} has no {REPORT_NAME}, which --csv and --plot need")
    if csv is not None:
        csv.write_text(to_csv(written), encoding="utf-8")
    if plot is not None:
        plot_report(written, plot)


def shape_of(layer: PackedLayer) -> str:
    """Rows and columns, with the number of experts in front where there are several."""
    if not layer.experts:
        return f"{layer.shape[0]}x{layer.shape[1]}"
    return f"{layer.experts} x {layer.shape[0] // layer.experts}x{layer.shape[1]}"


def show(report: CheckpointReport) -> None:
    """Print the tables for people."""
    console = out_console()
    method = report.quant_method or "not quantized"
    console.print(f"{bold(report.source)}  {report.architecture or 'unknown architecture'}, {method}")
    if report.layers:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("layer", overflow="fold")
        for name in ("shape", "bits", "group", "bits/weight", "outliers", "error", "bytes"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in report.layers:
            table.add_row(
                layer.name,
                shape_of(layer),
                "-" if layer.bits is None else str(layer.bits),
                "-" if layer.group_size is None else str(layer.group_size),
                f"{layer.bits_per_weight:.3f}",
                f"{layer.outliers} ({layer.outliers / layer.weights:.2%})",
                number_or_none(layer.error),
                str(layer.nbytes),
            )
        console.print(table)
        outliers = sum(layer.outliers for layer in report.layers)
        console.print(
            f"[bold]packed[/bold]  {len(report.layers)} layers, {report.packed_weights:,} weights in "
            f"{size_of(report.packed_bytes)}: [bold]{report.bits_per_weight:.3f} bits per weight[/bold], "
            f"{outliers} outliers ({outliers / report.packed_weights:.2%})"
        )
    if report.foreign:
        console.print(
            f"{size_of(report.file_bytes)} on disk, quantized in the format of another program, whose bits are not"
            " counted here. `hf-spqr convert` rewrites official SpQR and GPTQ v2.",
            soft_wrap=True,
        )
        return
    console.print(
        f"[bold]others[/bold]  {report.other_weights:,} weights in {size_of(report.other_bytes)}\n"
        f"[bold]all[/bold]     {size_of(report.file_bytes)} on disk, "
        f"{report.model_bits_per_weight:.3f} bits per weight of the whole model"
    )
