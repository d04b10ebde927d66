"""What a file calls the tensors of a model: Transformers renames some, and takes fused experts apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hf_spqr.nn.experts import ExpertsKind, describe

__all__ = ["ExpertFinder", "Renamer", "file_names"]


class Renamer:
    """The names that Transformers gives to the tensors of a file when it loads them into ``model``."""

    def __init__(self, model: nn.Module) -> None:
        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.prefix = getattr(model, "base_model_prefix", None)
        self.meta = dict.fromkeys(model.state_dict(), True)

    def __call__(self, name: str) -> list[str]:
        new, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.meta)
        if new not in self.meta and name in self.meta:
            return [name]
        if pattern is None:
            return [new]
        converter = next(c for c in self.converters if pattern in c.source_patterns)
        return [new.replace(converter.target_patterns[0], other) for other in converter.target_patterns]


class ExpertFinder:
    """Finds out to which expert of a model (still unpacked) a packed matrix of a file belongs."""

    def __init__(self, model: nn.Module, rename: Callable[[str], list[str]]) -> None:
        self.rename = rename
        kinds = {name: describe(module) for name, module in model.named_modules()}
        self.kinds: dict[str, ExpertsKind] = {name: kind for name, kind in kinds.items() if kind is not None}
        self.names = {
            name: {stored: projection for projection, stored in file_names(model, name, kind).items()}
            for name, kind in self.kinds.items()
        }
        self.modules: dict[str, str] = {}

    def __call__(self, name: str) -> tuple[str, str, int] | None:
        """Experts module, projection and number of the expert for the module name of a matrix in the file, or None."""
        match = re.fullmatch(r"(.+)\.(\d+)\.(\w+)", name)
        if match is None or not self.kinds:
            return None
        prefix, expert, stored = match.groups()
        if prefix not in self.modules:
            self.modules[prefix] = self.rename(f"{prefix}.down_proj")[0].rpartition(".")[0]
        module = self.modules[prefix]
        names = self.names.get(module, {})
        projection = names.get(stored)
        if names and projection is None:  # a renaming of Transformers that is not meant for experts hits them too
            projection = names.get(self.rename(f"{name}.packed")[0].split(".")[-2])
        if projection is None or int(expert) >= self.kinds[module].experts:
            return None
        return module, projection, int(expert)


def file_names(model: nn.Module, name: str, kind: ExpertsKind) -> dict[str, str]:
    """What a file calls the projections of the experts module called ``name``, by projection.

    The original names, where the original checkpoint holds experts one by one; else those of the projections.
    """
    found: dict[str, str] = {}
    projections = list(kind.projections)
    for parameter, own in ((kind.fused, projections[:-1]), ("down_proj", projections[-1:])):
        for converter in get_model_conversion_mapping(model):  # type: ignore[arg-type]
            stored = _stored_names(converter, name, parameter)
            if len(stored) == len(own):
                found |= zip(own, stored, strict=True)
                break
    if len(found) < len(projections) or len(set(found.values())) < len(projections):
        return {projection: projection for projection in projections}
    return found


def _stored_names(converter: Any, module: str, parameter: str) -> list[str]:
    """``["gate_proj", "up_proj"]`` where ``converter`` merges ``<module>.*.gate_proj.weight`` and up into one."""
    if not isinstance(converter, WeightConverter):
        return []
    try:
        back = converter.reverse_transform()
    except NotImplementedError:
        return []
    renamed, pattern = back.rename_source_key(f"{module}.{parameter}")
    if pattern is None:
        return []
    every = [renamed.replace(back.target_patterns[0], target) for target in back.target_patterns]
    matches = [re.fullmatch(re.escape(module) + r"\.\*\.(\w+)\.weight", one) for one in every]
    return [match.group(1) for match in matches if match is not None]
