"""Ctrl-C and ``kill``: an exit like any other, so that unfinished folders are removed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_spqr.cli.common import err_console

__all__ = ["ends_on_signals"]

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@contextmanager
def ends_on_signals() -> Iterator[None]:
    """What runs in the block ends with SystemExit, 128 + its number, and one line when a signal of ``WORDS`` comes.

    Whatever other exception a library makes of it: importing one that is stopped halfway may give an ImportError.
    """
    came: list[int] = []

    def stop(number: int, frame: Any) -> None:
        came.append(number)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in WORDS}
    try:
        yield
    except BaseException:
        if not came:
            raise
        err_console().print(WORDS[signal.Signals(came[0])])
        raise SystemExit(128 + came[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
