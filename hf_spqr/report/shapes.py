"""Shapes of packed layers. A packed matrix is padded, so its shape is not in the file; it is found elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spqr.errors import CheckpointError, ConfigError
from hf_spqr.report.records import REPORT_NAME, QuantizationReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_spqr.config import PackedConfig
    from hf_spqr.report.names import Renamer

__all__ = ["LayerShapes", "empty_model", "packed_config"]

COLUMNS = 32
"""Columns of a tile of the packed format."""
ROWS = 16
MOST_COLUMNS = 1 << 24


def packed_config(folder: Path, quantization: Mapping[str, Any]) -> PackedConfig | None:
    """The object of a ``quantization_config``; None for methods of other packages.

    Raises CheckpointError, naming the file in ``folder``, where a field is out of range or the version is unknown.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    from hf_spqr.config import PackedConfig

    config_class = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(quantization.get("quant_method")))
    if config_class is None or not issubclass(config_class, PackedConfig):
        return None
    try:
        return config_class.from_dict(dict(quantization))
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def empty_model(folder: Path) -> PreTrainedModel:
    """The model that config.json in ``folder`` describes, not quantized and without memory for weights.

    Raises CheckpointError where it describes none.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from hf_spqr.report.model_classes import without_weights

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return without_weights(config)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / 'config.json'} describes no model that can be built: {error}") from error


class LayerShapes:
    """(out_features, in_features) of the layers of the checkpoint in ``folder``, and what its config says of them.

    quantization   ``quantization_config`` of config.json
    report         the report beside the weights, None without one
    """

    def __init__(self, folder: Path, quantization: Mapping[str, Any], report: QuantizationReport | None) -> None:
        self.folder = folder
        self.quantization = quantization
        self.report = report

    def in_model(self, name: str) -> str:
        """What the model calls the layer that a file calls ``name``."""
        if (self.report and self.report.layer(name)) or ".experts." in name or name in self._model_shapes:
            return name
        return self._rename(f"{name}.weight")[0].removesuffix(".weight")

    def layout(self, name: str, shape: tuple[int, int]) -> Any:
        """The packed layout of a layer, with its bits and group_size; None for methods of other packages."""
        return None if self._config is None else self._config.layout(*shape, name)

    def find(self, name: str, tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Shape of one matrix called ``name``, an expert's number left out, whose packed tensors have these shapes.

        It is looked up in the report, then in an empty model built from config.json; for experts, which a model fuses,
        it is computed from the packed tensor, exact up to the padding of in_features to a multiple of 32.

        Raises CheckpointError where all three fail.
        """
        entry = self.report.layer(name) if self.report else None
        if entry is not None:
            return entry.shape[0] // max(entry.experts, 1), entry.shape[1]
        if name in self._model_shapes:
            return self._model_shapes[name]
        if ".experts." in name and self._config is not None:
            shape = _from_words(self._config, name, tensors)
            if shape is not None:
                return shape
        raise CheckpointError(
            f"the shape of {name} is not known: {self.folder} has no {REPORT_NAME} that names it, "
            "and the model of config.json has no such linear layer"
        )

    @cached_property
    def _config(self) -> PackedConfig | None:
        return packed_config(self.folder, self.quantization)

    @cached_property
    def _model(self) -> PreTrainedModel:
        return empty_model(self.folder)

    @cached_property
    def _rename(self) -> Renamer:
        from hf_spqr.report.names import Renamer

        return Renamer(self._model)

    @cached_property
    def _model_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the linear layers of the model that config.json describes."""
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
