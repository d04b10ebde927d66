"""The model card: a README.md with Hub metadata, made from the quantization report. No network, no files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hf_spqr.errors import ConfigError
from hf_spqr.report.checkpoint import CheckpointReport
from hf_spqr.report.records import QuantizationReport

__all__ = ["PLOT_NAME", "check_evaluation", "hub_name", "model_card"]

PLOT_NAME = "quantization_error.png"
"""Name of the picture that the card shows."""

SHORT = {"hf_spqr": "spqr", "omniquant": "omniquant"}
MOST_SKIPPED = 8
"""Names of untouched layers that the card lists; the report has them all."""


def hub_name(name: str | None) -> str | None:
    """``name`` where it can be a repository ("user/model"), None where it is a path or nothing."""
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")) else None


def check_evaluation(evaluation: Mapping[str, Any] | None) -> None:
    """Raise ConfigError unless ``evaluation`` is a perplexity of ``hf-spqr eval --json``, or None."""
    if evaluation is not None and not {"perplexity", "protocol_text", "dataset", "dtype"} <= set(evaluation):
        raise ConfigError(
            "evaluation is not a result of `hf-spqr eval --json`: it has no perplexity, dataset or dtype."
        )


def model_card(
    report: QuantizationReport,
    repo_id: str,
    *,
    checkpoint: CheckpointReport | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    evaluation: Mapping[str, Any] | None = None,
    plot: str | None = None,
    loader: str = "AutoModelForCausalLM",
    task: str | None = "text-generation",
    own_code: bool = False,
) -> str:
    """The text of the card.

    Args:
        report: what the quantization did.
        repo_id: where the model can be loaded from.
        checkpoint: the files, for the size of everything.
        base_model: the repository that was quantized; by default the one of the report.
        license: of the base model, for the metadata.
        tags: more tags for the metadata.
        evaluation: what ``hf-spqr eval --json`` printed for this model, perhaps with its ``base``.
        plot: name of a picture beside the card, see :data:`PLOT_NAME`.
        loader: the Auto class of Transformers that loads the model.
        task: the Hub's name of what it does; None for no name.
        own_code: whether the repository has Python code that loading runs.

    Raises:
        ConfigError: ``evaluation`` is not such a result.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    check_evaluation(evaluation)
    base_model = base_model or hub_name(report.base_model)
    config = report.config
    bits, group_size = config.get("bits", 0), config.get("group_size", -1)
    skipped = report.skipped[:MOST_SKIPPED]
    if len(report.skipped) > MOST_SKIPPED:
        skipped.append(f"and {len(report.skipped) - MOST_SKIPPED} more")
    totals = report.totals()
    environment = Environment(
        loader=PackageLoader("hf_spqr", "report"),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(
        metadata=_metadata(report, base_model, license, tags, task),
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        base_model=base_model,
        method=report.method,
        bits=bits,
        group_size=group_size,
        act_bits=config.get("act_bits"),
        outlier_share=report.outliers / report.weights if report.weights else 0.0,
        bits_per_weight=report.bits_per_weight,
        layers=totals["layers"],
        weights=totals["weights"],
        nbytes=totals["nbytes"],
        mean_error=totals["mean_error"],
        file_bytes=0 if checkpoint is None else checkpoint.file_bytes,
        model_bits=0.0 if checkpoint is None else checkpoint.model_bits_per_weight,
        calibration=report.calibration,
        seconds=report.seconds,
        hardware=report.hardware,
        evaluation=None if evaluation is None else _public(evaluation),
        plot=plot,
        loader=loader,
        own_code=own_code,
        has_processor=task == "image-text-to-text",
        notes=report.notes,
        skipped=skipped,
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
        config={"overrides": None, **config},
        config_json=json.dumps(config, indent=2),
    )


def _public(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation with the name of the file that was scored, not its path on somebody's machine."""
    dataset = str(evaluation["dataset"])
    is_file = dataset.endswith((".txt", ".json", ".jsonl"))
    return {"base": None, **evaluation, "dataset": PurePath(dataset).name if is_file else dataset}


def _metadata(
    report: QuantizationReport, base_model: str | None, license: str | None, tags: Sequence[str], task: str | None
) -> str:
    """The YAML block of the Hub."""
    fields: dict[str, Any] = {"library_name": "transformers"}
    if task:
        fields["pipeline_tag"] = task
    if base_model:
        fields |= {"base_model": base_model, "base_model_relation": "quantized"}
    if license:
        fields["license"] = license
    own = ["hf-spqr", SHORT.get(report.method, report.method), "quantized", f"{report.config.get('bits')}-bit"]
    fields["tags"] = list(dict.fromkeys([*own, *tags]))
    lines = []
    for key, value in fields.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"
