"""The command ``hf-spqr``. One module per command; this one puts them together and turns mistakes into messages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from inspect import getdoc  # the name inspect is a command here
from typing import Annotated

import typer
from rich.markup import escape
from safetensors import SafetensorError

from hf_spqr import __version__
from hf_spqr.cli.bench import bench_command
from hf_spqr.cli.common import err_console, print_json
from hf_spqr.cli.convert import convert_command
from hf_spqr.cli.doctor import doctor_command
from hf_spqr.cli.eval import eval_command
from hf_spqr.cli.export import export_command
from hf_spqr.cli.inspect import inspect_command
from hf_spqr.cli.processes import is_shown_elsewhere
from hf_spqr.cli.push import push_command
from hf_spqr.cli.quantize import quantize_command
from hf_spqr.cli.stop import ends_on_signals
from hf_spqr.errors import HfSpqrError

__all__ = ["app", "main"]

app = typer.Typer(
    name="hf-spqr",
    help="Quantize language models with SpQR or OmniQuant, look at the result and measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"hf-spqr {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize_command,
    "eval": eval_command,
    "inspect": inspect_command,
    "bench": bench_command,
    "convert": convert_command,
    "export": export_command,
    "push": push_command,
    "doctor": doctor_command,
}


def _help(command: Callable[..., None]) -> str:
    """The docstring, each paragraph on one line for the terminal to wrap; indented ones, the examples, as they are."""
    paragraphs = (getdoc(command) or "").split("\n\n")
    return "\n\n".join(text if text.startswith(" ") else text.replace("\n", " ") for text in paragraphs)


for name, command in COMMANDS.items():
    app.command(name, help=_help(command))(command)


def message(error: Exception) -> str:
    """What ``error`` says; of one of the system, the file and the reason without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 1 when the work failed, 2 when the call was wrong.

    What a user can mend (a missing or damaged file, a full disk, a field out of range, a missing optional package) is
    one message without a traceback; with ``--json`` it is also ``{"error": ...}`` on stdout. Anything else is a bug
    and shows its traceback. Ctrl-C gives 130, SIGTERM (``kill``, torchrun, batch systems) 143; unfinished folders are
    removed.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with ends_on_signals():
            app(arguments, prog_name="hf-spqr")
    except (HfSpqrError, OSError, ImportError, SafetensorError) as error:
        if is_shown_elsewhere(error):
            raise SystemExit(1) from None
        if "--json" in arguments:
            print_json({"error": message(error), "type": type(error).__name__})
        err_console().print("[red]error:[/red]", escape(message(error)), soft_wrap=True)
        raise SystemExit(1) from None
