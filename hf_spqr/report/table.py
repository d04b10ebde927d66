"""A report as CSV, one line per layer."""

from __future__ import annotations

import csv
import io

from hf_spqr.report.records import QuantizationReport

__all__ = ["to_csv"]

COLUMNS = (
    "name",
    "method",
    "out_features",
    "in_features",
    "bits",
    "group_size",
    "bits_per_weight",
    "outliers",
    "error",
    "nbytes",
    "seconds",
)


def to_csv(report: QuantizationReport) -> str:
    """Return the layers of ``report`` as CSV text with a header line; an error that was not measured is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for layer in report.layers:
        writer.writerow(
            [
                layer.name,
                layer.method,
                layer.shape[0],
                layer.shape[1],
                layer.bits,
                layer.group_size,
                f"{layer.bits_per_weight:.6g}",
                layer.outliers,
                "" if layer.error is None else f"{layer.error:.6g}",
                layer.nbytes,
                f"{layer.seconds:.4g}",
            ]
        )
    return buffer.getvalue()
