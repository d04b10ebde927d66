"""What lies beside the weights and the tokenizer of a model that reads more than text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import cached_file

__all__ = ["PROCESSOR", "copy_processor"]

PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files of processors for images, sound and video; text is the tokenizer's, which saves itself."""


def copy_processor(model: str, folder: Path) -> list[str]:
    """Copy the processor's files beside ``model``, a folder or a name on the Hub, to ``folder``; their names.

    Python files that they name are among them, and those that these import. None is run.
    """
    copied: list[str] = []
    waiting = list(PROCESSOR)
    for name in waiting:
        try:
            path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        except OSError:  # the model is there no more, or its name is none
            return copied
        if path is None:
            continue
        shutil.copyfile(path, folder / name)
        copied.append(name)
        modules = get_relative_imports(path) if name.endswith(".py") else _modules_named(Path(path))
        waiting += [file for module in modules if (file := f"{module.replace('.', '/')}.py") not in waiting]
    return copied


def _modules_named(file: Path) -> list[str]:
    """The modules beside ``file`` that its ``auto_map`` takes classes from; those of other repositories left out."""
    try:
        places = json.loads(file.read_text(encoding="utf-8"))["auto_map"].values()
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
    return [place.rpartition(".")[0] for place in places if isinstance(place, str) and "--" not in place]
