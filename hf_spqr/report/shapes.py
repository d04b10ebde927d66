"""Shapes of packed layers. A packed matrix is padded, so its shape is not in the file; it is found elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_spqr.errors import CheckpointError
from hf_spqr.report.records import REPORT_NAME, LayerReport, QuantizationReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_spqr.config import PackedConfig
    from hf_spqr.report.names import ExpertFinder

__all__ = ["LayerShapes", "without_number"]

EXPERT = re.compile(r"^(.+\.experts)\.\d+\.(.+)$")


def without_number(name: str) -> str:
    """The name of a projection of all experts, from that of the matrix of one; any other name as it is."""
    return EXPERT.sub(r"\1.\2", name)


class LayerShapes:
    """What is known of the packed matrices of the checkpoint in ``folder``, by their names in the file.

    The model, the report and the patterns of the config may call a layer by another name, :meth:`in_model`.

    quantization        ``quantization_config`` of config.json
    report              the report beside the weights, None without one
    trust_remote_code   whether code beside the weights may be run, to know the model
    """

    def __init__(
        self,
        folder: Path,
        quantization: Mapping[str, Any],
        report: QuantizationReport | None,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.quantization = quantization
        self.report = report

    def in_model(self, name: str) -> str:
        """What the model calls the layer of a matrix; one projection of all experts is one layer."""
        own = without_number(name)
        if self.report is not None and self.report.layer(own) is not None:
            return own
        place = self._find_expert(name)
        return ".".join(place[:2]) if place else self._find_expert.rename(f"{name}.weight")[0].rpartition(".")[0]

    def entry(self, name: str) -> LayerReport | None:
        """What the report says of the layer of a matrix; None without a report, or where it does not name it."""
        return None if self.report is None else self.report.layer(self.in_model(name))

    def layout(self, name: str, shape: tuple[int, int]) -> Any:
        """The packed layout of a matrix, with its bits and group_size; None for methods of other packages."""
        if self._config is None:
            return None
        return self._config.layout(*shape, without_number(name), self.in_model(name))

    def find(self, name: str) -> tuple[int, int]:
        """(out_features, in_features) of a matrix, from the report, else from the model that config.json describes.

        Raises CheckpointError where neither knows it.
        """
        entry = self.entry(name)
        if entry is not None:
            return entry.shape[0] // max(entry.experts, 1), entry.shape[1]
        layer = self.in_model(name)
        if layer not in self._model_shapes:
            raise CheckpointError(
                f"the shape of {name} is not known: {self.folder} has no {REPORT_NAME} that names it, "
                "and the model of config.json has no such linear layer"
            )
        return self._model_shapes[layer]

    @cached_property
    def _config(self) -> PackedConfig | None:
        from hf_spqr.report.model import packed_config

        return packed_config(self.folder, self.quantization)

    @cached_property
    def _model(self) -> PreTrainedModel:
        from hf_spqr.report.model import empty_model

        return empty_model(self.folder, self.trust_remote_code)

    @cached_property
    def _find_expert(self) -> ExpertFinder:
        from hf_spqr.report.names import ExpertFinder, Renamer

        return ExpertFinder(self._model, Renamer(self._model))

    @cached_property
    def _model_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the linear layers of the model, and of one expert of its fused ones, by name."""
        from hf_spqr.nn import dense

        modules = self._model.named_modules()
        shapes = {name: dense.features(module) for name, module in modules if isinstance(module, dense.DENSE_CLASSES)}
        for name, kind in self._find_expert.kinds.items():
            shapes |= {f"{name}.{projection}": shape for projection, shape in kind.projections.items()}
        return shapes
