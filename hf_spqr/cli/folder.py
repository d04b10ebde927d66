"""Output folders that are either complete or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_spqr.cli.common import CommandError, size_of

__all__ = ["check_output", "check_space", "complete_folder"]

ROOM = 1.25
"""Times its least size that a model may well take, with many outliers."""


def check_output(out: Path, overwrite: bool, inputs: tuple[str | Path, ...] = ()) -> None:
    """Raise CommandError unless ``out`` may be written: absent, empty, or a model folder that may be replaced.

    ``inputs`` are models and files that are read; replacing one of them, or a folder around one, is always refused.
    """
    resolved = out.resolve()
    for model in inputs:
        path = Path(model)
        if path.exists() and path.resolve().is_relative_to(resolved):
            raise CommandError(f"{out} is, or contains, the input {model}; choose another output folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CommandError(f"{out} exists and is not a folder; choose another name")
    if resolved.is_mount():
        raise CommandError(f"{out} is a mount point, which no folder can take the place of; give a folder in it")
    around = _around(out)
    if not around.is_dir() or not os.access(around, os.W_OK | os.X_OK):
        raise CommandError(f"{out} cannot be made: {around} is no folder that may be written; choose another name")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise CommandError(f"{out} exists and is not empty; choose another name or give --overwrite")
    if not (out / "config.json").is_file():
        raise CommandError(f"{out} does not look like a model folder (no config.json), so it is not replaced")


def check_space(out: Path, nbytes: int) -> str | None:
    """Raise CommandError unless a model of at least ``nbytes`` can be written; a sentence where it may be too large.

    A model that is replaced stays until the new one is complete.
    """
    around = _around(out)
    free = shutil.disk_usage(around).free
    if free < nbytes:
        raise CommandError(
            f"{out}: the model will take at least {size_of(nbytes)}, and {around} has {size_of(free)} left; make room"
            " or choose another folder"
        )
    if free < ROOM * nbytes:
        return f"{around} has {size_of(free)} left; the model will take {size_of(nbytes)} and what outliers take."
    return None


@contextmanager
def complete_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` that takes its place, in one rename, when the block ends well.

    On any exception, an interrupt included, the temporary folder is removed and ``out`` is as it was.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield partial
        _open_to_others(partial)
        if not out.exists():
            os.replace(partial, out)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        os.replace(out, old)  # an empty folder may be replaced by a rename
        try:
            os.replace(partial, out)
        except BaseException:
            os.replace(old, out)
            raise
        shutil.rmtree(old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _around(out: Path) -> Path:
    """The nearest folder above ``out`` that exists."""
    return next(path for path in out.resolve().parents if path.exists())


def _open_to_others(folder: Path) -> None:
    """Permissions as of anything new; temporary folders and what safetensors writes are for their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
