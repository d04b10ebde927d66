"""Names in files and names in models: Transformers changes some of them when it loads and saves."""

from __future__ import annotations

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["Renamer"]


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
