"""``hf-spqr quantize``: from a model to a complete folder with the quantized model."""

from __future__ import annotations

import inspect
import time
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_spqr.cli.common import (
    CommandError,
    DeviceOption,
    Dtype,
    JsonOption,
    ModelArgument,
    OutArgument,
    OverwriteOption,
    ShardSizeOption,
    TrustOption,
    bold,
    check_device,
    check_model,
    check_shard_size,
    err_console,
    load_model,
    load_tokenizer,
    number_or_none,
    out_console,
    parse_json_object,
    print_json,
    read_config,
    size_of,
)
from hf_spqr.cli.folder import check_output, check_space, complete_folder
from hf_spqr.cli.processes import local_device, process_group

if TYPE_CHECKING:
    from hf_spqr.config import PackedConfig
    from hf_spqr.quantize.ranks import Ranks
    from hf_spqr.report.records import QuantizationReport

MOST_SEQLEN = 2048
CALIBRATION, SPQR, OMNIQUANT, LAYERS = "Calibration", "SpQR only", "OmniQuant only", "Layers"  # panels of --help


class Method(str, Enum):
    """Quantization methods of the command line."""

    spqr = "spqr"
    omniquant = "omniquant"


class Mode(str, Enum):
    """Ours, or the published algorithm in every choice."""

    default = "default"
    reference = "reference"


def quantize_command(
    model: ModelArgument,
    out: OutArgument,
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            "-d",
            help="Calibration text: a txt, json or jsonl file, or a data set on the Hub, name:config:split.",
        ),
    ],
    nsamples: Annotated[
        int, typer.Option("--nsamples", help="Number of calibration sequences.", rich_help_panel=CALIBRATION)
    ] = 128,
    seqlen: Annotated[
        int | None,
        typer.Option(
            "--seqlen",
            help=f"Tokens per sequence. Default: the model's positions, at most {MOST_SEQLEN}.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Order in which texts are drawn.", rich_help_panel=CALIBRATION)
    ] = 0,
    method: Annotated[Method, typer.Option("--method", help="Quantization method.")] = Method.spqr,
    bits: Annotated[
        int | None,
        typer.Option("--bits", help="Bits of a weight code, 2 to 8. Default: 3, or by --target-bits; OmniQuant 4."),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            help="Inputs that share a scale: 8, 16, 32, 64, 128, or -1 for a whole row. Default: 16, or by"
            " --target-bits; OmniQuant 128.",
        ),
    ] = None,
    mode: Annotated[
        Mode | None,
        typer.Option("--mode", help="reference: the published algorithm in every choice. Default: default."),
    ] = None,
    outlier_threshold: Annotated[
        str | None,
        typer.Option(
            "--outlier-threshold",
            help="Smaller keeps more weights in 16 bit, inf none. Default: 0.2.",
            rich_help_panel=SPQR,
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            "--target-bits",
            help="Bits per weight that the layers shall take: chooses bits, group size and outliers, or what of them"
            " is not given.",
            rich_help_panel=SPQR,
        ),
    ] = None,
    scale_bits: Annotated[
        int | None,
        typer.Option("--scale-bits", help="Bits of a scale's own code. Default: 3.", rich_help_panel=SPQR),
    ] = None,
    zero_bits: Annotated[
        int | None,
        typer.Option("--zero-bits", help="Bits of a zero point's own code. Default: 3.", rich_help_panel=SPQR),
    ] = None,
    second_group: Annotated[
        int | None,
        typer.Option(
            "--second-group", help="Statistics per second level: 16 or 32. Default: 16.", rich_help_panel=SPQR
        ),
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order/--no-act-order",
            help="Sort the columns by activation energy, as published. Default: of the mode.",
            rich_help_panel=SPQR,
        ),
    ] = None,
    percdamp: Annotated[
        float | None,
        typer.Option("--percdamp", help="Damping of the Hessian. Default: of the mode.", rich_help_panel=SPQR),
    ] = None,
    true_sequential: Annotated[
        bool | None,
        typer.Option(
            "--true-sequential/--together",
            help="Calibrate the layers of a block one after another, not on one pass. Default: together.",
            rich_help_panel=SPQR,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", help="Bits and learning by name: W3A16g128, W4A4, W8A8, ...", rich_help_panel=OMNIQUANT
        ),
    ] = None,
    sym: Annotated[
        bool | None,
        typer.Option(
            "--sym/--asym", help="Symmetric weights, no zero points. Default: no.", rich_help_panel=OMNIQUANT
        ),
    ] = None,
    act_bits: Annotated[
        int | None,
        typer.Option("--act-bits", help="Bits of the activations, 2 to 8. Default: none.", rich_help_panel=OMNIQUANT),
    ] = None,
    act_sym: Annotated[
        bool | None,
        typer.Option("--act-sym/--act-asym", help="Symmetric activations. Default: no.", rich_help_panel=OMNIQUANT),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", help="Passes over the calibration data for each block.", rich_help_panel=OMNIQUANT),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Sequences in a step.", rich_help_panel=OMNIQUANT)
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            help="Leave layers alone: name, suffix or regular expression; may be repeated.",
            rich_help_panel=LAYERS,
        ),
    ] = None,
    overrides: Annotated[
        str | None,
        typer.Option(
            "--overrides",
            help='Other fields for some layers, as JSON or @file: \'{"down_proj": {"bits": 4}}\'.',
            rich_help_panel=LAYERS,
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Data type to load and save the rest in.")] = Dtype.auto,
    device: DeviceOption = None,
    max_shard_size: ShardSizeOption = "50GB",
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Quantize MODEL and write OUT: weights, config, tokenizer, generation config and quantization_report.json.

    This is from_pretrained(MODEL, quantization_config=...) followed by save_pretrained(OUT), with the class that
    MODEL's config.json names. The result loads with plain from_pretrained(OUT).

    [bold]Examples[/bold]

      hf-spqr quantize examples/demo-model out/demo \\
          -d examples/demo-calibration.jsonl

      hf-spqr quantize MODEL OUT -d c4.jsonl --target-bits 4.2 --seqlen 2048

      hf-spqr quantize MODEL OUT -d text.txt --skip layers.0 \\
          --overrides '{"down_proj": {"bits": 4}}'

      hf-spqr quantize MODEL OUT --mode reference --percdamp 1.0 \\
          -d Salesforce/wikitext:wikitext-2-raw-v1:train

      hf-spqr quantize MODEL OUT -d c4.jsonl --method omniquant --preset W3A16g128

      torchrun --nproc-per-node 4 --no-python \\
          hf-spqr quantize MODEL OUT -d c4.jsonl --device cuda
    """
    start = time.monotonic()
    with process_group() as ranks:
        with ranks.together():
            check_model(model)
            check_device(device)
            files = [dataset, *([overrides[1:]] if overrides and overrides.startswith("@") else [])]
            check_output(out, overwrite, inputs=(model, *files))
            check_shard_size(max_shard_size)
            base = check_base(model, trust_remote_code)
            config = build_config(
                method,
                preset=preset,
                mode=None if mode is None else mode.value,
                bits=bits,
                group_size=group_size,
                sym=sym,
                act_bits=act_bits,
                act_sym=act_sym,
                epochs=epochs,
                batch_size=batch_size,
                scale_bits=scale_bits,
                zero_bits=zero_bits,
                second_group=second_group,
                outlier_threshold=None if outlier_threshold is None else parse_threshold(outlier_threshold),
                target_bits=target_bits,
                act_order=act_order,
                percdamp=percdamp,
                true_sequential=true_sequential,
                dataset=dataset,
                nsamples=nsamples,
                seqlen=min(MOST_SEQLEN, positions(base)) if seqlen is None else seqlen,
                seed=seed,
                modules_to_not_convert=skip,
                overrides=parse_json_object("--overrides", overrides),
            )
            least = plan(base, config, dtype, trust_remote_code)
            if ranks.first and target_bits is not None:
                chosen = (
                    f"--target-bits {target_bits:g}: bits={config.get('bits')}, group_size={config.get('group_size')}"
                )
                err_console().print(chosen, markup=False, soft_wrap=True)
            if ranks.first and (warning := check_space(out, least)):
                err_console().print(f"warning: {warning}", markup=False, soft_wrap=True)
        with complete_folder(out) if ranks.first else nullcontext() as partial:
            report = run(model, config, partial, dtype, local_device(device), max_shard_size, ranks, trust_remote_code)
    if not ranks.first:
        return
    seconds = time.monotonic() - start
    if json:
        print_json({"out": str(out), "seconds": seconds, **report.to_dict()})
    else:
        show(out, report, seconds)


def parse_threshold(text: str) -> float:
    """A number or inf."""
    try:
        return float(text)
    except ValueError:
        raise CommandError(f"--outlier-threshold {text}: give a number, or inf for no outliers") from None


def build_config(method: Method, preset: str | None, mode: str | None, **fields: Any) -> PackedConfig:
    """The config of ``method`` from the options that were given, the others being None.

    Raises ConfigError for a value out of range and CommandError for an option that the method does not have or that
    another one contradicts.
    """
    from hf_spqr.config import OmniQuantConfig, SpQRConfig

    given = {name: value for name, value in fields.items() if value is not None}
    config_class = SpQRConfig if method is Method.spqr else OmniQuantConfig
    for name in given.keys() - inspect.signature(config_class).parameters.keys():
        raise CommandError(f"--{name.replace('_', '-')} has no meaning for --method {method.value}")
    if method is Method.spqr:
        if preset is not None:
            raise CommandError(f"--preset has no meaning for --method {method.value}")
        if {"target_bits", "outlier_threshold"} <= given.keys():
            raise CommandError("--target-bits chooses the threshold: leave out --outlier-threshold, or --target-bits")
        return SpQRConfig(**(given if mode is None else {**given, "mode": mode}))
    if preset is not None:
        return OmniQuantConfig.from_preset(preset, reference=mode == "reference", **given)
    if mode == "reference":
        raise CommandError("--mode reference of OmniQuant needs a --preset, for example W3A16g128")
    return OmniQuantConfig(**given)


def check_base(model: str, trust_remote_code: bool = False) -> Any:
    """Transformers' config of the base model; CommandError when it is quantized already."""
    config = read_config(model, trust_remote_code)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = dict(quantization)["quant_method"]
        raise CommandError(f"{model} is quantized already ({method}); give the model that it was made from")
    return config


def positions(base: Any) -> int:
    """How many tokens the model of this config can take; MOST_SEQLEN where it does not say."""
    return getattr(base.get_text_config(), "max_position_embeddings", None) or MOST_SEQLEN


def plan(base: Any, config: PackedConfig, dtype: Dtype, trust_remote_code: bool = False) -> int:
    """Settle ``config`` for this model; the bytes that it takes at least once it is quantized.

    From an empty model, before any weight is read. Raises ConfigError where ``target_bits`` is out of reach and
    UnsupportedLayerError where there is nothing to quantize.
    """
    import torch

    from hf_spqr.quantize import driver
    from hf_spqr.report.model_classes import without_weights

    wanted = (base.dtype or torch.bfloat16) if dtype is Dtype.auto else getattr(torch, dtype.value)
    empty = without_weights(base, wanted, trust_remote_code)
    driver.settle(empty, config)
    return driver.least_bytes(empty, config)


def run(
    model: str,
    config: PackedConfig,
    folder: Path | None,
    dtype: Dtype,
    device: str | None,
    max_shard_size: str,
    ranks: Ranks,
    trust_remote_code: bool = False,
) -> QuantizationReport:
    """Quantize and, where there is a ``folder``, save into it; return the report."""
    from hf_spqr.integrations.beside import copy_beside

    with ranks.together():
        tokenizer = load_tokenizer(model, trust_remote_code)
    config.tokenizer = tokenizer
    quantized: Any = load_model(model, dtype, device, trust_remote_code=trust_remote_code, quantization_config=config)
    report: QuantizationReport = quantized.quantization_report
    with ranks.together():
        if folder is not None:
            quantized.save_pretrained(folder, max_shard_size=max_shard_size)
            tokenizer.save_pretrained(folder)
            copy_beside(model, folder)
            report.save(folder)
    return report


def show(out: Path, report: QuantizationReport, seconds: float) -> None:
    """Print the summary for people."""
    for note in report.notes:
        err_console().print(f"note: {note}", markup=False, soft_wrap=True)
    totals = report.totals()
    out_console().print(
        f"{bold(out)}  {totals['layers']} layers, {totals['weights']:,} weights in "
        f"{size_of(totals['nbytes'])}: [bold]{number_or_none(totals['bits_per_weight'], 3)} bits per weight[/bold], "
        f"{totals['outliers']} outliers, mean layer error {number_or_none(totals['mean_error'])}, {seconds:.0f} s"
    )
    out_console().print(f"Next: hf-spqr eval {out} --dataset FILE    hf-spqr inspect {out}", markup=False)
