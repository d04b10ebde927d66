"""``hf-spqr export``: our checkpoints in other people's formats."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from hf_spqr.cli.common import (
    CommandError,
    Dtype,
    JsonOption,
    ModelArgument,
    OutArgument,
    OverwriteOption,
    ShardSizeOption,
    TrustOption,
    bold,
    check_model,
    check_shard_size,
    load_model,
    out_console,
    print_json,
    size_of,
    stored_method,
)
from hf_spqr.cli.convert import copy_preprocessing
from hf_spqr.cli.folder import check_output, complete_folder


class Format(str, Enum):
    """Formats that can be written."""

    spqr = "spqr"
    gptq_v2 = "gptq_v2"
    compressed_tensors = "compressed-tensors"


def export_command(
    model: ModelArgument,
    out: OutArgument,
    format: Annotated[Format, typer.Option("--format", "-f", help="Format to write.")],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Data type of what is not quantized.")] = Dtype.auto,
    max_shard_size: ShardSizeOption = "50GB",
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Write a model that hf-spqr quantized in the format of another program.

    [bold]spqr[/bold]: the official SpQR layout, for 3-bit SpQR models in groups of 16. [bold]gptq_v2[/bold] and
    [bold]compressed-tensors[/bold]: for OmniQuant, GPTQ and round-to-nearest models; vLLM, SGLang and plain
    Transformers serve them without hf-spqr.

    [bold]Examples[/bold]

      hf-spqr export out/model-W4 out/model-W4-ct --format compressed-tensors

      hf-spqr export out/model-SpQR out/model-official --format spqr
    """
    check_model(model)
    check_output(out, overwrite, inputs=(model,))
    check_shard_size(max_shard_size)
    if stored_method(model, trust_remote_code) is None:
        raise CommandError(f"{model} is not quantized; export takes models that hf-spqr has quantized")
    from hf_spqr.integrations.export import export_model

    loaded: Any = load_model(model, dtype, None, trust_remote_code=trust_remote_code)
    with complete_folder(out) as partial:
        export_model(loaded, partial, format.value, max_shard_size=max_shard_size)
        tokenizer = copy_preprocessing(model, partial, trust_remote_code)
        nbytes = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    if json:
        print_json({"out": str(out), "format": format.value, "weight_file_bytes": nbytes, "tokenizer": tokenizer})
    else:
        out_console().print(f"{bold(out)}  {format.value}, {size_of(nbytes)} of weight files")
