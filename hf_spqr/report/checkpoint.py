"""What a checkpoint holds, from the headers of its safetensors files: no weights are read and no model is loaded."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_spqr.errors import CheckpointError
from hf_spqr.report.records import QuantizationReport
from hf_spqr.report.shapes import LayerShapes, without_number

__all__ = [
    "INDEX", "SINGLE", "CheckpointReport", "PackedLayer", "TensorInfo", "inspect_checkpoint", "read_headers",
    "weight_files",
]  # fmt: skip

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PACKED = ".packed"
PARTS = ("packed", "outlier_row", "outlier", "perm", "weight")
"""Tensors that belong to a packed matrix; ``weight`` is the empty sentinel."""


@dataclass(frozen=True)
class TensorInfo:
    """dtype as safetensors names it ("BF16", "I32"), shape and size in bytes of one tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass
class PackedLayer:
    """One packed layer of a checkpoint.

    ``shape`` is (out_features, in_features); ``error`` comes from the report beside the weights, None without one.
    ``nbytes`` counts the packed tensors, not the bias. One projection of all experts of a mixture is one layer:
    ``experts`` is their number (0 for a plain layer) and ``shape`` has all their rows.
    """

    name: str
    shape: tuple[int, int]
    bits: int | None
    group_size: int | None
    outliers: int
    reordered: bool
    nbytes: int
    error: float | None = None
    experts: int = 0

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


@dataclass
class CheckpointReport:
    """A checkpoint as its files show it.

    quant_method    of config.json, None for a model that is not quantized
    layers          the packed layers in the order of their names
    other_weights,
    other_bytes     elements and bytes of all tensors that do not belong to a packed matrix (embeddings, norms, biases)
    file_bytes      size of the safetensors files, headers included
    """

    source: str
    architecture: str | None
    quant_method: str | None
    layers: list[PackedLayer] = field(default_factory=list)
    other_weights: int = 0
    other_bytes: int = 0
    file_bytes: int = 0

    @property
    def packed_weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Mean over the packed layers, counted from bytes; NaN when nothing is packed."""
        return 8 * self.packed_bytes / self.packed_weights if self.layers else math.nan

    @property
    def foreign(self) -> bool:
        """Whether the weights are quantized in the format of another program, whose elements are no weights."""
        return self.quant_method is not None and not self.layers

    @property
    def model_bits_per_weight(self) -> float:
        """Mean over everything in the files, embeddings and norms included; NaN for an empty or foreign checkpoint."""
        if self.foreign:
            return math.nan
        weights = self.packed_weights + self.other_weights
        return 8 * (self.packed_bytes + self.other_bytes) / weights if weights else math.nan

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; what is not defined is null."""
        layers = [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "bits": layer.bits,
                "group_size": layer.group_size,
                "bits_per_weight": layer.bits_per_weight,
                "outliers": layer.outliers,
                "reordered": layer.reordered,
                "error": layer.error,
                "experts": layer.experts,
                "nbytes": layer.nbytes,
            }
            for layer in self.layers
        ]
        model_bits = self.model_bits_per_weight
        return {
            "source": self.source,
            "architecture": self.architecture,
            "quant_method": self.quant_method,
            "layers": layers,
            "totals": {
                "layers": len(self.layers),
                "weights": self.packed_weights,
                "nbytes": self.packed_bytes,
                "bits_per_weight": self.bits_per_weight if self.layers else None,
                "outliers": sum(layer.outliers for layer in self.layers),
                "other_weights": self.other_weights,
                "other_bytes": self.other_bytes,
                "model_bits_per_weight": None if math.isnan(model_bits) else model_bits,
                "file_bytes": self.file_bytes,
            },
        }


def read_headers(path: str | Path) -> dict[str, TensorInfo]:
    """Names and sizes of the tensors of one safetensors file. Raises CheckpointError when it is none or damaged."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():
                header = opened.get_slice(name)
                dtype, shape = header.get_dtype(), tuple(header.get_shape())
                digits = re.search(r"\d+", dtype)  # BF16, I32, F8_E4M3; BOOL has none
                bits = int(digits.group()) if digits else 8
                tensors[name] = TensorInfo(dtype, shape, math.prod(shape) * bits // 8)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}). Download or copy it again.") from error
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a load of ``folder`` reads, in the order of their names.

    They are model.safetensors, else what the index names, else all: variants and names of other programs. Others may
    lie beside them, left by an earlier save.

    Raises CheckpointError when the index is damaged or a file that it names is not there.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(data["weight_map"].values()))
        _ = data["metadata"]  # Transformers asks for it
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({type(error).__name__}: {error}); fetch it again") from error
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}: the model is incomplete.")
    return [folder / name for name in names]


def inspect_checkpoint(folder: str | Path, trust_remote_code: bool = False) -> CheckpointReport:
    """Describe the checkpoint in ``folder``, quantized or not.

    trust_remote_code: run a model's own code in ``folder``, where nothing else says what its layers are.

    Raises:
        CheckpointError: no config.json, no safetensors files, a damaged file, or a packed layer whose shape is known
            neither from the report nor from the model's config, or that these contradict.
    """
    folder = Path(folder)
    config = _read_config(folder)
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors files; only safetensors checkpoints can be inspected")
    tensors = {name: info for file in files for name, info in read_headers(file).items()}
    quantization = config.get("quantization_config") or {}
    architectures = config.get("architectures") or [None]
    report = CheckpointReport(str(folder), architectures[0], quantization.get("quant_method"))
    report.file_bytes = sum(file.stat().st_size for file in files)

    names = sorted((name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)), key=_natural)
    layers: dict[str, dict[str, dict[str, TensorInfo]]] = {}
    for name in names:
        parts = {part: tensors.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors}
        layers.setdefault(without_number(name), {})[name] = parts
    shapes = LayerShapes(folder, quantization, QuantizationReport.load(folder), trust_remote_code)
    for found in layers.values():
        first, matrices = next(iter(found)), list(found.values())
        name, entry = without_number(shapes.in_model(first)), shapes.entry(first)
        rows, columns = shapes.find(first)
        layout = shapes.layout(first, (rows, columns))
        wrong = {parts["packed"].shape for parts in matrices} - {layout.packed_shape()} if layout else None
        if wrong:
            raise CheckpointError(
                f"{name}: {layout} is packed as {list(layout.packed_shape())}, the file has {list(wrong.pop())}: the"
                " config or the report beside it belong to another file"
            )
        report.layers.append(
            PackedLayer(
                name=name,
                shape=(rows * len(matrices), columns),
                bits=layout.bits if layout else None,
                group_size=layout.group_size if layout else None,
                outliers=sum(math.prod(parts["outlier"].shape) for parts in matrices if "outlier" in parts),
                reordered="perm" in matrices[0],
                nbytes=sum(info.nbytes for parts in matrices for info in parts.values()),
                error=entry.error if entry and max(entry.experts, 1) == len(matrices) else None,
                experts=len(matrices) if len(matrices) > 1 else 0,
            )
        )
    report.other_weights = sum(math.prod(info.shape) for info in tensors.values())
    report.other_bytes = sum(info.nbytes for info in tensors.values())
    return report


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; give the folder of a Transformers model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config") or {}, dict):
        raise CheckpointError(f"{path} is damaged: it, and quantization_config in it, should be JSON objects")
    return config
