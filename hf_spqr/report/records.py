"""What a quantization run did, layer by layer: plain dataclasses with a JSON round trip.

The report is written beside the weights as ``quantization_report.json``. Bits per weight are always computed from
the bytes of the packed tensors, never from the nominal width.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_spqr.errors import CheckpointError

__all__ = ["REPORT_NAME", "BlockReport", "CalibrationReport", "LayerReport", "QuantizationReport", "library_versions"]

REPORT_NAME = "quantization_report.json"
REPORT_VERSION = 1


@dataclass
class LayerReport:
    """One quantized layer.

    name         module name in the model, e.g. ``model.layers.0.self_attn.q_proj``
    shape        (out_features, in_features)
    method       "spqr", "gptq", "rtn", "omniquant"
    bits         width of the weight codes
    group_size   inputs that share one scale (-1 = the whole row)
    nbytes       bytes of all packed tensors of the layer, the bias not counted
    outliers     weights kept in 16 bit
    error        relative output error sqrt(tr(dW H dW^T) / tr(W H W^T)) on the calibration data; None if not measured
    seconds      wall-clock time of this layer's quantization, the forward passes not counted
    experts      number of experts whose matrices the entry sums up (`shape` has all their rows); 0 for a plain layer
    undersampled experts that saw fewer tokens than they have inputs; tokens of the whole layer stood in for the rest
    """

    name: str
    shape: tuple[int, int]
    method: str
    bits: int
    group_size: int
    nbytes: int
    outliers: int = 0
    error: float | None = None
    seconds: float = 0.0
    experts: int = 0
    undersampled: int = 0

    @property
    def weights(self) -> int:
        """Number of weights of the original layer."""
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight counted from the packed bytes."""
        return 8 * self.nbytes / self.weights

    @property
    def outlier_share(self) -> float:
        """Share of the weights that are kept in 16 bit."""
        return self.outliers / self.weights


@dataclass
class BlockReport:
    """One block that learned its layers together.

    name          module name of the block, e.g. ``model.layers.0``
    nearest       squared error of its output, in the metric that is learned by (docs/omniquant.md), when its weights
                  are rounded to nearest, on the samples kept out
    initial       the same at the starting point of the training
    final         the same as stored; never more than ``initial``
    steps         training steps, ``skipped`` of them for a loss or gradient that was not finite
    kept_initial  training did not help, the starting point was stored
    transforms    names of the equivalent transforms in use
    """

    name: str
    nearest: float | None
    initial: float
    final: float
    steps: int
    skipped: int = 0
    kept_initial: bool = False
    transforms: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """The block in a sentence."""
        nearest = "no finite error" if self.nearest is None else f"squared error {self.nearest:.4g}"
        return (
            f"{self.name}: {nearest} rounding to nearest, {self.initial:.4g} before and {self.final:.4g} after"
            " training"
            + (f", {len(self.transforms)} transforms" if self.transforms else "")
            + (f"; {self.skipped} steps skipped" if self.skipped else "")
            + ("; training did not help" if self.kept_initial else "")
            + "."
        )


@dataclass
class CalibrationReport:
    """The data that the run saw.

    description   where it came from, e.g. "demo-calibration.jsonl" or "list of 128 texts"
    samples       number of sequences
    tokens        number of tokens in all of them
    seqlen        asked length of a sequence in tokens
    """

    description: str
    samples: int
    tokens: int
    seqlen: int


@dataclass
class QuantizationReport:
    """A whole quantization run.

    method       quantization method of the checkpoint ("hf_spqr", "omniquant")
    config       the quantization config as a JSON object
    calibration  the data, None where the method needs none
    layers       one entry per quantized layer, in the model's order
    blocks       one entry per block where a method learns block by block
    skipped      names of the linear layers that were left as they were
    notes        what the run wants to say in words: the chosen threshold, damping that had to be raised, ...
    seconds      wall-clock time of the whole run
    versions     library versions, see :func:`library_versions`
    hardware     processor and accelerators that the run could use
    base_model   Hub name of the model that was quantized, None where it came from a folder
    """

    method: str
    config: dict[str, Any]
    calibration: CalibrationReport | None = None
    layers: list[LayerReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    hardware: str = field(default_factory=lambda: hardware_name())
    base_model: str | None = None

    @property
    def weights(self) -> int:
        """Weights of all quantized layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Packed bytes of all quantized layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def outliers(self) -> int:
        """Weights kept in 16 bit in all quantized layers."""
        return sum(layer.outliers for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per weight of the quantized layers, counted from bytes; NaN when there are none."""
        return 8 * self.nbytes / self.weights if self.weights else math.nan

    @property
    def mean_error(self) -> float:
        """Mean of the layers' relative errors, each layer counted once; NaN when none was measured."""
        errors = [layer.error for layer in self.layers if layer.error is not None]
        return sum(errors) / len(errors) if errors else math.nan

    def layer(self, name: str) -> LayerReport | None:
        """The layer of that name, or None."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def totals(self) -> dict[str, Any]:
        """Sums over all layers as a JSON object."""
        return {
            "layers": len(self.layers),
            "weights": self.weights,
            "nbytes": self.nbytes,
            "bits_per_weight": _finite(self.bits_per_weight),
            "outliers": self.outliers,
            "mean_error": _finite(self.mean_error),
            "seconds": self.seconds,
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object, with totals and bits per weight written out for the reader."""
        out: dict[str, Any] = {"report_version": REPORT_VERSION, **asdict(self)}
        for entry, layer in zip(out["layers"], self.layers, strict=True):
            entry["shape"] = list(layer.shape)
            entry["bits_per_weight"] = layer.bits_per_weight
            entry["error"] = None if layer.error is None else _finite(layer.error)
        out["totals"] = self.totals()
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizationReport:
        """Inverse of :meth:`to_dict`. Raises CheckpointError on an unknown version or a missing field."""
        version = data.get("report_version") if isinstance(data, Mapping) else None
        if version != REPORT_VERSION:
            raise CheckpointError(
                f"{REPORT_NAME} has report_version {version!r}, this hf_spqr reads {REPORT_VERSION}; "
                "install the version of hf_spqr that wrote it, or delete the file"
            )
        try:
            calibration = data["calibration"]
            return cls(
                method=data["method"],
                config=dict(data["config"]),
                calibration=None if calibration is None else CalibrationReport(**calibration),
                layers=[_layer(entry) for entry in data["layers"]],
                blocks=[BlockReport(**entry) for entry in data.get("blocks", [])],
                skipped=list(data["skipped"]),
                notes=list(data["notes"]),
                seconds=data["seconds"],
                versions=dict(data["versions"]),
                hardware=data.get("hardware", ""),
                base_model=data.get("base_model"),
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{REPORT_NAME} is damaged ({error!r}); delete it or quantize again") from error

    def save(self, folder: str | Path) -> Path:
        """Write ``quantization_report.json`` into ``folder``; return its path."""
        path = Path(folder) / REPORT_NAME
        path.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> QuantizationReport | None:
        """Read the report of a checkpoint folder; None when the folder has none."""
        path = Path(folder) / REPORT_NAME
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path} is not JSON ({error}); delete it or quantize again") from error
        return cls.from_dict(data)


def _layer(entry: Mapping[str, Any]) -> LayerReport:
    fields = {key: value for key, value in entry.items() if key != "bits_per_weight"}
    return LayerReport(**{**fields, "shape": tuple(fields["shape"])})


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on, without importing them."""
    versions = {"python": platform.python_version()}
    for name in ("hf-spqr", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "datasets", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware_name() -> str:
    """Name of the processor, and of the accelerators that torch sees."""
    import torch

    names = [platform.processor() or platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        names = [lines[0].partition(":")[2].strip()] if lines else names
    names += sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    return ", ".join(names)
