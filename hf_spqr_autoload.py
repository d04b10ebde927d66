"""Lets plain ``from_pretrained`` find hf_spqr without ``import hf_spqr``.

``import torch`` calls :func:`init` through the ``torch.backends`` entry point, and so does ``import hf_spqr``. It
imports nothing and changes nothing in torch: it leaves a note for the moment when Transformers' tables of quantizers
are imported, which then import the rest of hf_spqr once they are asked for one of its methods. Set
``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` to keep torch from calling it.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Any

TABLES = "transformers.quantizers.auto"
MAPPINGS = ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING")
METHODS = ("hf_spqr", "omniquant")
TAKEN_OVER = "spqr"
"""Transformers' own key for official SpQR checkpoints, which hf_spqr loads in its place."""


class _LazyMapping(dict):
    """A dict that has hf_spqr add its methods when one of them is first asked for."""

    def _load(self, key: object) -> bool:
        if key not in (*METHODS, TAKEN_OVER):
            return False
        try:
            import hf_spqr.integrations  # noqa: F401
        except Exception as error:  # a broken installation must not break Transformers
            warnings.warn(f"hf_spqr is installed but cannot be imported: {error!r}", stacklevel=3)
        return dict.__contains__(self, key)

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) or self._load(key)

    def __getitem__(self, key: object) -> Any:
        if key == TAKEN_OVER:
            self._load(key)
        return dict.__getitem__(self, key)

    def __missing__(self, key: object) -> Any:
        if self._load(key):
            return dict.__getitem__(self, key)
        raise KeyError(key)

    def get(self, key: object, default: Any = None) -> Any:
        return self[key] if key in self else default


def _prepare(tables: ModuleType) -> None:
    for name in MAPPINGS:
        mapping = getattr(tables, name, None)
        if type(mapping) is dict:
            setattr(tables, name, _LazyMapping(mapping))


def find_tables() -> ModuleType | None:
    """Transformers' tables, once all of their module has been imported; None before."""
    tables = sys.modules.get(TABLES)
    return tables if all(hasattr(tables, name) for name in MAPPINGS) else None


class _Finder:
    """Waits on ``sys.meta_path`` for the import of Transformers' tables, then steps aside.

    Where that import is the one that imported torch, it waits for whatever is imported next.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        tables = find_tables()
        if tables is not None:
            sys.meta_path.remove(self)
            _prepare(tables)
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _prepare(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def init() -> None:
    """Entry point of ``torch.backends``. Never raises: torch would turn that into a failed ``import torch``."""
    try:
        tables = find_tables()
        if tables is not None:
            _prepare(tables)
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception:
        pass
