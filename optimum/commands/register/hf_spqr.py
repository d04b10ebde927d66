"""``optimum-cli hf-spqr ...``, the same as ``hf-spqr ...``.

optimum runs every file that it finds in ``optimum/commands/register``. The folders have no ``__init__.py``: they are
shared with optimum and its other subpackages (PEP 420).
"""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser
from collections.abc import Sequence
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


def run_hf_spqr(arguments: Sequence[str]) -> None:
    from hf_spqr.cli import main  # optimum imports this file for every command

    main(arguments)


class HfSpqrCommand(BaseOptimumCLICommand):
    """Hands all that follows ``hf-spqr`` to the command line of this package."""

    COMMAND = CommandInfo(name="hf-spqr", help="Quantize with SpQR and OmniQuant, look at the result and measure it.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=REMAINDER)
        parser.print_help = _help  # type: ignore[method-assign]

    def run(self) -> None:
        assert self.args is not None
        run_hf_spqr(self.args.arguments)


def _help(file: Any = None) -> None:
    run_hf_spqr(["--help"])


REGISTER_COMMANDS = [HfSpqrCommand]
