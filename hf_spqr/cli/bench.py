"""``hf-spqr bench``: how fast packed layers are on this machine, and what to expect of whole models."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hf_spqr.cli.common import (
    Backend,
    BackendOption,
    CommandError,
    DeviceOption,
    JsonOption,
    check_device,
    err_console,
    out_console,
    print_json,
    progress,
)

if TYPE_CHECKING:
    from hf_spqr.bench.run import Kind, Row

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
PROMPT = 128
SECONDS = 3.0
QUICK_SECONDS = 1.5


class Method(str, Enum):
    """Packed formats."""

    spqr = "spqr"
    affine = "affine"


def bench_command(
    method: Annotated[
        Method | None, typer.Option("--method", help="Only this format. Default: both, spqr 3 bit and affine 4 bit.")
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="Bits of a code, with --method.", min=2, max=8)] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Inputs that share a scale, with --method. Default: 16 or 128.")
    ] = None,
    outliers: Annotated[
        float, typer.Option("--outliers", help="Share of weights that spqr keeps in 16 bit.", min=0, max=0.2)
    ] = 0.01,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of the prompt that is timed.", min=2)] = PROMPT,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads of torch. Default: its own choice.", min=1)
    ] = None,
    device: DeviceOption = None,
    backend: BackendOption = Backend.auto,
    quick: Annotated[bool, typer.Option("--quick", help="One shape only, in a few seconds.")] = False,
    file: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON object to a file.")] = None,
    json: JsonOption = False,
) -> None:
    """Time packed layers on this machine, without a model, and estimate decoding for common model sizes.

    Layers of random weights, called as a model calls them, each time on another copy of the weights, so that they come
    from memory and not from a cache. torch's bfloat16 and the memory's bandwidth are measured in the same run. The
    estimates for whole models follow from these times; they are no measurements of models.

    [bold]Examples[/bold]

      hf-spqr bench

      hf-spqr bench --quick --threads 4

      hf-spqr bench --method spqr --bits 4 --outliers 0.005 -o bench.json
    """
    import torch

    from hf_spqr import ops
    from hf_spqr.bench.run import free_memory, measure_layers, model_estimates, seconds_per_layer

    kinds = chosen(method, bits, group_size, outliers, backend)
    check_device(device)
    on = "cpu" if device is None else device
    if torch.device(on).type not in ("cpu", "cuda"):
        raise CommandError(f"--device {on}: there are kernels for cpu and cuda only")
    missing = "_C" if not ops.COMPILED else "_C_cuda" if on != "cpu" and not ops.COMPILED_CUDA else None
    if missing:
        raise CommandError(
            f"the compiled kernels are not there ({ops.WHY_NOT.get(missing)}), and the PyTorch reference is not worth "
            "timing; `hf-spqr doctor` says what to install"
        )
    if file is not None and not file.parent.is_dir():
        raise CommandError(f"--output {file}: the folder {file.parent} does not exist")
    if threads is not None:
        torch.set_num_threads(threads)
    shapes = SHAPES[:1] if quick else SHAPES
    with progress("measuring") as advance:
        rows = measure_layers(kinds, shapes, (1, prompt), on, QUICK_SECONDS if quick else SECONDS, advance)
    per_layer = seconds_per_layer() if on == "cpu" else 0.0
    free = free_memory(on)
    data: dict[str, Any] = {
        "machine": describe(on),
        "device": on,
        "threads": torch.get_num_threads(),
        "read_bytes_per_second": max(row.limit_bytes_per_second for row in rows),
        "seconds_per_layer_beside_matrices": per_layer,
        "free_bytes": free,
        "layers": [row.to_dict() for row in rows],
        "estimates": model_estimates(rows, per_layer, free),
    }
    if file is not None:
        import json as json_module

        file.write_text(json_module.dumps(data, indent=2) + "\n", encoding="utf-8")
        err_console().print(f"wrote {file}", markup=False)
    if json:
        print_json(data)
    else:
        show(data, rows)


def chosen(
    method: Method | None, bits: int | None, group_size: int | None, outliers: float, backend: Backend
) -> list[Kind]:
    """What to time; BadParameter for options that need --method, or that the format does not have."""
    from hf_spqr.bench.run import Kind
    from hf_spqr.formats.affine import AffineLayout
    from hf_spqr.formats.spqr import SpQRLayout

    if method is None:
        if bits is not None or group_size is not None:
            raise typer.BadParameter("--bits and --group-size need --method spqr or --method affine")
        return [Kind("spqr", 3, 16, outliers, backend.value), Kind("affine", 4, 128, backend=backend.value)]
    layout: Any = SpQRLayout if method is Method.spqr else AffineLayout
    defaults = (3, 16) if method is Method.spqr else (4, 128)
    kind = Kind(
        method.value,
        defaults[0] if bits is None else bits,
        defaults[1] if group_size is None else group_size,
        outliers if method is Method.spqr else 0.0,
        backend.value,
    )
    try:
        layout(*SHAPES[0], kind.bits, kind.group_size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return [kind]


def describe(device: str) -> dict[str, Any]:
    """Processor or GPU, and the versions of the libraries."""
    import torch

    from hf_spqr.cli.doctor import cpu
    from hf_spqr.report.records import library_versions

    name = cpu()["name"] if device == "cpu" else torch.cuda.get_device_name(device)
    return {
        "name": name,
        "kernels": torch.ops.hf_spqr.cpu_isa() if device == "cpu" else "cuda",
        "versions": library_versions(),
    }


def show(data: dict[str, Any], rows: list[Row]) -> None:
    """Print the tables for people."""
    console = out_console()
    on = f"{data['threads']} threads" if data["device"] == "cpu" else data["device"]
    console.print(
        f"[bold]{data['machine']['name']}[/bold]  {on}, kernels: {data['machine']['kernels']}, memory is read at "
        f"{data['read_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("layer", "tokens", "kind"):
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for name in ("bits/weight", "µs", "of bandwidth", "x bf16"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        of_limit = row.bytes_per_second / row.limit_bytes_per_second
        table.add_row(
            f"{row.shape[0]}x{row.shape[1]}",
            str(row.tokens),
            row.name,
            f"{row.bits_per_weight:.2f}",
            f"{row.seconds * 1e6:.0f}",
            f"{of_limit:.0%}" if row.tokens == 1 else "-",
            f"{row.times_bf16:.2f}",
        )
    console.print(table)
    overhead = data["seconds_per_layer_beside_matrices"]
    console.print(
        f"\n[bold]estimated decoding[/bold], one sequence, short context: the layers at the speeds above, the output "
        f"layer in bfloat16{f', {overhead * 1e6:.0f} µs a layer for everything else' if overhead else ''}"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model", justify="right")
    table.add_column("kind", no_wrap=True)
    for name in ("weights", "fits in memory", "tokens/s (estimate)"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in data["estimates"]:
        table.add_row(
            one["model"],
            one["kind"],
            f"{one['weight_bytes'] / 2**30:.1f} GiB",
            "yes" if one["fits"] else "no",
            f"{one['tokens_per_second']:.1f}" if one["fits"] else f"({one['tokens_per_second']:.1f})",
        )
    console.print(table)
    console.print(f"{data['free_bytes'] / 2**30:.1f} GiB of memory are free; in brackets: with enough memory")
