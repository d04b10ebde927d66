"""Shapes of packed layers. A packed matrix is padded, so its shape is not in the file; it is found elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spqr.errors import CheckpointError
from hf_spqr.report.records import REPORT_NAME, LayerReport, QuantizationReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_spqr.config import PackedConfig

__all__ = ["LayerShapes"]

COLUMNS = 32
"""Columns of a tile of the packed format."""
ROWS = 16
MOST_COLUMNS = 1 << 24


class LayerShapes:
    """(out_features, in_features) of the layers of the checkpoint in ``folder``, and what its config says of them.

    Layers go by their names in the file, which may differ from those in the model and in the report.

    quantization   ``quantization_config`` of config.json
    report         the report beside the weights, None without one
    """

    def __init__(self, folder: Path, quantization: Mapping[str, Any], report: QuantizationReport | None) -> None:
        self.folder = folder
        self.quantization = quantization
        self.report = report

    def entry(self, name: str) -> LayerReport | None:
        """What the report says of a layer; None without a report, or where it does not name the layer."""
        found = [self.report.layer(each) for each in self._names(name)] if self.report else []
        return next((entry for entry in found if entry is not None), None)

    def layout(self, name: str, shape: tuple[int, int]) -> Any:
        """The packed layout of a layer, with its bits and group_size; None for methods of other packages."""
        return None if self._config is None else self._config.layout(*shape, *self._names(name))

    def find(self, name: str, tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Shape of one matrix called ``name``, an expert's number left out, whose packed tensors have these shapes.

        It is looked up in the report, then in an empty model built from config.json; for experts, which a model fuses,
        it is computed from the packed tensor, exact up to the padding of in_features to a multiple of 32.

        Raises CheckpointError where all three fail.
        """
        entry = self.entry(name)
        if entry is not None:
            return entry.shape[0] // max(entry.experts, 1), entry.shape[1]
        shape = next((self._model_shapes[each] for each in self._names(name) if each in self._model_shapes), None)
        if shape is None and ".experts." in name and self._config is not None:
            shape = _from_words(self._config, name, tensors)
        if shape is None:
            raise CheckpointError(
                f"the shape of {name} is not known: {self.folder} has no {REPORT_NAME} that names it, "
                "and the model of config.json has no such linear layer"
            )
        return shape

    def _names(self, name: str) -> tuple[str, ...]:
        """``name`` and, unless the report knows it, what the model calls the layer."""
        if self.report is not None and self.report.layer(name) is not None:
            return (name,)
        return name, self._rename(f"{name}.weight")[0].rpartition(".")[0]

    @cached_property
    def _config(self) -> PackedConfig | None:
        from hf_spqr.report.model import packed_config

        return packed_config(self.folder, self.quantization)

    @cached_property
    def _model(self) -> PreTrainedModel:
        from hf_spqr.report.model import empty_model

        return empty_model(self.folder)

    @cached_property
    def _rename(self) -> Callable[[str], list[str]]:
        from hf_spqr.report.model import Renamer

        return Renamer(self._model)

    @cached_property
    def _model_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the linear layers of the model."""
        from hf_spqr.nn import dense

        modules = self._model.named_modules()
        return {name: dense.features(module) for name, module in modules if isinstance(module, dense.DENSE_CLASSES)}


def _from_words(config: PackedConfig, name: str, tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """The smallest multiple of 32 columns whose packed matrix is as wide as this one; None if there is none."""
    blocks, words = tensors["packed"]
    rows = tensors["outlier_row"][0] - 1 if "outlier_row" in tensors else blocks * ROWS
    low, high = 1, MOST_COLUMNS // COLUMNS
    while low < high:
        middle = (low + high) // 2
        if config.layout(rows, COLUMNS * middle, name).packed_shape()[1] < words:
            low = middle + 1
        else:
            high = middle
    columns = COLUMNS * low
    return (rows, columns) if config.layout(rows, columns, name).packed_shape() == (blocks, words) else None
