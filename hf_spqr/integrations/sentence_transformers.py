"""What lies beside the weights of a Sentence Transformers model: how it pools, its further layers, its prompts.

Without these files ``SentenceTransformer(folder)`` pools as it does by default and says so only in the log.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from transformers.utils import cached_file

__all__ = ["copy_modules", "module_folders"]

logger = logging.getLogger(__name__)

MODULES = "modules.json"
SETTINGS = (
    "config_sentence_transformers.json",
    *(f"sentence_{kind}_config.json" for kind in (
        "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet",
    )),
)  # fmt: skip
"""Prompts, the similarity function, and the length of texts; the second is the same file under older names."""


def copy_modules(model: str, folder: Path) -> None:
    """Copy the files of Sentence Transformers beside ``model``, a folder or a name on the Hub, to ``folder``.

    Modules with weights of their own (``2_Dense``) are copied as they are; code that ``modules.json`` names, too. None
    is run. Nothing is done where ``model`` has no ``modules.json``.
    """
    if not _copy(model, MODULES, folder):
        return
    for name in SETTINGS:
        _copy(model, name, folder)
    for module in _modules(folder):
        kind = str(module.get("type", ""))
        if not kind.startswith("sentence_transformers."):  # a class in a file beside it
            _copy(model, f"{kind.rpartition('.')[0].replace('.', '/')}.py", folder)
    for path in module_folders(folder):
        try:
            source = Path(model if Path(model).is_dir() else snapshot_download(model, allow_patterns=f"{path}/**"))
        except (OSError, HTTPError) as error:  # after hours of work
            logger.warning("%s could not be read: copy %s from it to %s by hand. (%s)", model, path, folder, error)
            continue
        if (source / path).is_dir():
            shutil.copytree(source / path, folder / path, dirs_exist_ok=True)
        else:  # 2_Normalize is an empty folder, which the Hub does not have
            (folder / path).mkdir(parents=True, exist_ok=True)


def module_folders(folder: Path) -> list[str]:
    """The folders in ``folder`` that its ``modules.json`` names; none where there is no such file."""
    paths = [Path(str(module.get("path", ""))) for module in _modules(folder)]
    return [str(path) for path in paths if path.parts and not path.is_absolute() and ".." not in path.parts]


def _modules(folder: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [module for module in found if isinstance(module, dict)] if isinstance(found, list) else []


def _copy(model: str, name: str, folder: Path) -> bool:
    """Copy the file called ``name`` where there is one; whether there is."""
    try:
        path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    except OSError:  # the model is there no more, or its name is none
        return False
    if path is None:
        return False
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(path, folder / name)
    return True
