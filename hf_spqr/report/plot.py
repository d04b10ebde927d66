"""A picture of a report: error and bits per weight of every layer. Needs matplotlib (`pip install hf-spqr[plot]`)."""

from __future__ import annotations

from pathlib import Path

from hf_spqr.errors import ConfigError
from hf_spqr.report.records import QuantizationReport

__all__ = ["plot_report"]

SUFFIXES = (".png", ".svg", ".pdf")


def plot_report(report: QuantizationReport, path: str | Path) -> Path:
    """Write a picture (format by the suffix of ``path``: png, svg, pdf) with one point per layer and kind of layer.

    The upper half shows the relative output error, the lower half the bits per weight counted from bytes. Layers of
    one kind (the last part of the name, e.g. ``q_proj``) share a colour. Raises ImportError without matplotlib and
    ConfigError when the report has no layers or the suffix is another one.
    """
    path = Path(path)
    if not report.layers:
        raise ConfigError("the report has no quantized layers, there is nothing to plot")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: the name of a picture ends in {', '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install hf-spqr[plot]") from error
    figure = Figure(figsize=(9, 6), layout="constrained")
    errors, bits = figure.subplots(2, 1, sharex=True)
    kinds: dict[str, list[int]] = {}
    for index, layer in enumerate(report.layers):
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(index)
    for kind, indices in kinds.items():
        layers = [report.layers[index] for index in indices]
        measured = [
            (index, layer.error) for index, layer in zip(indices, layers, strict=True) if layer.error is not None
        ]
        errors.plot([index for index, _ in measured], [error for _, error in measured], "o-", ms=4, lw=0.8, label=kind)
        bits.plot(indices, [layer.bits_per_weight for layer in layers], "o-", ms=4, lw=0.8)
    errors.set_ylabel("relative output error")
    errors.set_ylim(bottom=0)
    errors.legend(ncols=4, fontsize="small")
    errors.set_title(f"{report.method}: {report.bits_per_weight:.3f} bits per weight over {len(report.layers)} layers")
    bits.set_ylabel("bits per weight")
    bits.axhline(report.bits_per_weight, color="0.6", lw=0.8, ls="--")
    bits.set_xlabel("layer, in the model's order")
    figure.savefig(path, dpi=130)
    return path
