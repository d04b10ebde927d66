"""Reports of quantization runs: dataclasses, JSON, CSV, plot."""

from hf_spqr.report.records import (
    REPORT_NAME,
    BlockReport,
    CalibrationReport,
    LayerReport,
    QuantizationReport,
    library_versions,
)
from hf_spqr.report.table import to_csv

__all__ = [
    "REPORT_NAME",
    "BlockReport",
    "CalibrationReport",
    "LayerReport",
    "QuantizationReport",
    "library_versions",
    "to_csv",
]
