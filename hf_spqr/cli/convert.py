"""``hf-spqr convert``: other people's checkpoints rewritten in our format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_spqr.cli.common import (
    CommandError,
    Dtype,
    JsonOption,
    OutArgument,
    OverwriteOption,
    ShardSizeOption,
    TrustOption,
    bold,
    check_model,
    check_shard_size,
    err_console,
    load_model,
    number_or_none,
    out_console,
    print_json,
    size_of,
    stored_method,
)
from hf_spqr.cli.folder import check_output, complete_folder


def convert_command(
    model: Annotated[
        str,
        typer.Argument(metavar="IN", help="Official SpQR or GPTQ v2 checkpoint; the base model for --omniquant."),
    ],
    out: OutArgument,
    omniquant: Annotated[
        Path | None, typer.Option("--omniquant", help="OmniQuant's .pth file, to be applied to the base model IN.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option("--bits", help="Bits, for --omniquant and for GPTQ folders whose config has none.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Group size, likewise; -1: one group per output channel.")
    ] = None,
    act_bits: Annotated[
        int | None, typer.Option("--act-bits", help="Bits of the activations, for --omniquant (w4a4: 4).")
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Data type of what is not quantized.")] = Dtype.auto,
    max_shard_size: ShardSizeOption = "50GB",
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Rewrite in our format what another program quantized: official SpQR, GPTQ v2, OmniQuant's .pth files.

    Codes and scales stay what they were. In official SpQR checkpoints, outliers that the published converter stored as
    whole weights, where its format wants what is to be added, are found and repaired. GPTQ folders must be of version
    2, with zero points stored as they are. A .pth file needs its base model, and its bits and group size.

    [bold]Examples[/bold]

      hf-spqr convert elvircrn/Llama-2-7b-SPQR-3Bit-16x16-red_pajama-hf out/spqr

      hf-spqr convert falcon-180b-omniquant-w3a16g512 out/falcon \\
          --bits 3 --group-size 512

      hf-spqr convert meta-llama/Llama-2-7b-hf out/w3 \\
          --omniquant Llama-2-7b-w3a16g128.pth --bits 3 --group-size 128
    """
    check_model(model)
    check_output(out, overwrite, inputs=(model, *([] if omniquant is None else [omniquant])))
    check_shard_size(max_shard_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = read(model, dtype, omniquant, bits, group_size, act_bits, trust_remote_code)
    notes = list(loaded.quantization_report.notes)
    for warning in caught:
        if str(warning.message) not in notes:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    with complete_folder(out) as partial:
        loaded.save_pretrained(partial, max_shard_size=max_shard_size)
        loaded.quantization_report.save(partial)
        if not copy_preprocessing(model, partial, trust_remote_code):
            notes.append(f"{model} has no tokenizer; copy the one of the base model beside the weights.")
    totals = loaded.quantization_report.totals()
    if json:
        print_json({"out": str(out), "notes": notes, "totals": totals})
        return
    for note in notes:
        err_console().print(f"note: {note}", markup=False, soft_wrap=True)
    out_console().print(
        f"{bold(out)}  {totals['layers']} layers in {size_of(totals['nbytes'])}: "
        f"[bold]{number_or_none(totals['bits_per_weight'], 3)} bits per weight[/bold], {totals['outliers']} outliers"
    )


def read(
    model: str,
    dtype: Dtype,
    omniquant: Path | None,
    bits: int | None,
    group_size: int | None,
    act_bits: int | None,
    trust_remote_code: bool = False,
) -> Any:
    """The model in our format; CommandError for what is none of the formats."""
    method = stored_method(model, trust_remote_code)
    if omniquant is not None:
        from hf_spqr.integrations.omniquant_pth import apply_parameters, read_parameters

        if method is not None:
            raise CommandError(f"{model} is quantized already ({method}); --omniquant needs the base model")
        if bits is None:
            raise CommandError("--omniquant needs --bits, which the file does not say; its name does (w3a16g128: 3)")
        parameters = read_parameters(omniquant)
        loaded: Any = load_model(model, dtype, None, trust_remote_code=trust_remote_code)
        group_size = -1 if group_size is None else group_size
        apply_parameters(loaded, parameters, bits=bits, group_size=group_size, act_bits=act_bits)
        return loaded
    if act_bits is not None:
        raise CommandError("--act-bits goes with --omniquant only")
    if method == "spqr":
        if bits is not None or group_size is not None:
            raise CommandError(f"{model} is official SpQR, 3 bit in groups of 16: leave out --bits and --group-size")
        return load_model(model, dtype, None, trust_remote_code=trust_remote_code)
    if method == "gptq" or (method is None and bits is not None):
        import transformers

        from hf_spqr.integrations.gptq import load_gptq_v2

        transformers.utils.logging.disable_progress_bar()
        return load_gptq_v2(model, bits, group_size, dtype=dtype.value, trust_remote_code=trust_remote_code)
    if method in ("hf_spqr", "omniquant"):
        raise CommandError(f"{model} is in our format already: it loads as it is, and `hf-spqr export` writes others")
    found = f'its quant_method is "{method}"' if method else "it is not quantized"
    raise CommandError(
        f'{model}: convert reads official SpQR (quant_method "spqr") and GPTQ v2 checkpoints, {found}. A GPTQ folder'
        " without quantization_config needs --bits and --group-size"
    )


def copy_preprocessing(model: str, folder: Path, trust_remote_code: bool = False) -> bool:
    """Copy the processor of ``model`` and save its tokenizer into ``folder``; False when it has no tokenizer."""
    from transformers import AutoTokenizer

    from hf_spqr.integrations.beside import copy_beside

    copy_beside(model, folder)
    try:
        AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code).save_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True
