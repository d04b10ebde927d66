"""What all commands share: consoles, JSON output, options, and how a model is named, found and loaded."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError

from hf_spqr.errors import ConfigError, HfSpqrError

if TYPE_CHECKING:
    import torch

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there; messages go to stderr.")
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a Transformers model, or a Hub name.")]
OutArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to write. It appears complete or not at all.")
]
ShardSizeOption = Annotated[str, typer.Option("--max-shard-size", help="Largest weight file.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the model folder OUT if it exists.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help='Where to run: "cpu", "cuda", "cuda:1". Default: cpu.')
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Read it before.")
]


class Dtype(str, Enum):
    """Data types that a model can be loaded in; auto is what the checkpoint says."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Backend(str, Enum):
    """What runs packed layers, as in the configs."""

    auto = "auto"
    reference = "reference"
    int8_activations = "int8_activations"


BackendOption = Annotated[
    Backend,
    typer.Option("--backend", help="int8_activations: activations may be rounded to int8 where that is faster."),
]


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class CommandError(HfSpqrError):
    """The command cannot do what was asked; the message says why and what to do."""


def out_console() -> Console:
    """Results for people: stdout. Into a file or a pipe tables are as wide as they need to be."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 400, highlight=False, emoji=False)


def err_console() -> Console:
    """Messages and progress: stderr."""
    return Console(file=sys.stderr, highlight=False, emoji=False)


def bold(text: object) -> str:
    """``text``, a name or a path that may have brackets, as bold markup."""
    return f"[bold]{escape(str(text))}[/bold]"


def print_json(data: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


@contextmanager
def progress(description: str) -> Iterator[Any]:
    """A progress bar on stderr; yields a function (done, total) to call."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err_console(), transient=True) as bar:
        task = bar.add_task(escape(description), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size_of(nbytes: float) -> str:
    """Bytes for people: powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def one_line(error: Exception) -> str:
    """What ``error`` of another library says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def number_or_none(value: float | None, digits: int = 4) -> str:
    """A number with that many digits after the point, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def parse_json_object(option: str, text: str | None) -> dict[str, Any] | None:
    """The JSON object in ``text``, or in the file that ``text`` names after an @."""
    if text is None:
        return None
    if text.startswith("@"):
        path = Path(text[1:])
        if not path.is_file():
            raise ConfigError(f"{option}: the file {path} does not exist")
        text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f'{option} is not JSON ({error}); write it like \'{{"down_proj": {{"bits": 4}}}}\''
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{option} must be a JSON object, got {type(value).__name__}")
    return value


def check_model(model: str) -> None:
    """Raise CommandError when ``model`` is a path that does not exist or a folder without config.json."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CommandError(f"{model} is a folder without config.json; give the folder of a Transformers model")
    elif path.exists():
        raise CommandError(f"{model} is a file; give the folder of a Transformers model")
    elif model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CommandError(f"{model} does not exist")


def read_config(model: str, trust_remote_code: bool = False) -> Any:
    """The Transformers config of ``model``; CommandError when it cannot be read or its quant_method is unknown."""
    from transformers import AutoConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    import hf_spqr.integrations  # noqa: F401  (registers the quantization methods)
    from hf_spqr.report.model import BAD_CONFIG

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except BAD_CONFIG as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise untrusted(model) from error
        raise CommandError(f"{model}: its config.json cannot be read: {one_line(error)}") from error
    except OSError as error:
        place = ": its config.json" if Path(model).is_dir() else " is no folder here, and on the Hub it"
        raise CommandError(f"{model}{place} cannot be read: {one_line(error)}") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method")
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            raise CommandError(f"{model}: its quant_method {method!r} is one that this Transformers does not know")
    return config


def untrusted(model: str) -> CommandError:
    """The error about code that must not run."""
    return CommandError(
        f"{model} has Python code of its own, which must run to load it. Read its *.py files; if you trust them, add"
        " --trust-remote-code"
    )


def stored_method(model: str, trust_remote_code: bool = False) -> str | None:
    """``quant_method`` of the checkpoint; None when it is not quantized. Raises as :func:`read_config`."""
    quantization = getattr(read_config(model, trust_remote_code), "quantization_config", None)
    return None if quantization is None else dict(quantization)["quant_method"]


def check_device(device: str | None) -> None:
    """Raise CommandError for a device that torch does not know or that this machine does not have."""
    if device is None:
        return
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise CommandError(f"--device {device}: use cpu, cuda or cuda:N") from None
    if wanted.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise CommandError(f"--device {device}: this torch sees no CUDA device (`hf-spqr doctor` shows more)")
        if (wanted.index or 0) >= count:
            raise CommandError(f"--device {device}: this machine has {count} CUDA devices, the first is cuda:0")
        return
    try:
        torch.zeros(1, device=wanted).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device {device} cannot be used here ({error}); use cpu, cuda or cuda:N") from None


def check_shard_size(size: str) -> None:
    """Raise CommandError unless ``size`` is a file size as Transformers understands it, such as 5GB."""
    if not re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*[KMGT]B\s*", size, re.IGNORECASE) or not re.search("[1-9]", size):
        raise CommandError(f"--max-shard-size {size}: give a number and a unit (KB, MB, GB or TB), for example 5GB")


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside the model; CommandError when there is none."""
    from transformers import AutoTokenizer

    read_config(model, trust_remote_code)  # it is read for the tokenizer too, and mistakes in it are named here
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise untrusted(model) from error
        if Path(model).is_dir() and not any(Path(model, name).exists() for name in TOKENIZER_FILES):
            raise CommandError(
                f"{model} has no tokenizer: copy tokenizer.json and tokenizer_config.json, or what the model has"
                " instead, into this folder"
            ) from error
        raise CommandError(f"{model} has no tokenizer that can be loaded: {one_line(error)}") from error


def load_model(
    model: str,
    dtype: Dtype,
    device: str | None,
    backend: Backend = Backend.auto,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> torch.nn.Module:
    """``from_pretrained`` of the checkpoint's class, with hf_spqr registered and without Transformers' own bars.

    backend: of the packed layers, where there are any.
    """
    import transformers

    from hf_spqr.nn import GroupedLinear, PackedLinear
    from hf_spqr.report.checkpoint import weight_files
    from hf_spqr.report.model_classes import class_of

    check_model(model)
    check_device(device)
    model_class = class_of(read_config(model, trust_remote_code), trust_remote_code)
    if Path(model).is_dir():
        weight_files(Path(model))  # Transformers shows a traceback for a damaged index
    if device is not None:
        kwargs["device_map"] = device
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded = model_class.from_pretrained(model, dtype=dtype.value, trust_remote_code=trust_remote_code, **kwargs)
    except SafetensorError as error:  # of an unquantized model: those of packed ones are looked at before
        raise CommandError(f"{model}: a file is truncated or damaged ({error}). Download or copy it again.") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise CommandError(f"{model}: weights have other shapes than config.json says (report above)") from error
    for module in loaded.modules() if backend is not Backend.auto else ():
        if isinstance(module, PackedLinear | GroupedLinear):
            module.backend = backend.value
    return loaded


def check_writes_text(model: str, trust_remote_code: bool = False) -> None:
    """Raise CommandError unless ``model`` is one that continues a text, as its config.json says."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    from hf_spqr.report.model_classes import class_of

    config = read_config(model, trust_remote_code)
    found = class_of(config, trust_remote_code)
    continues = found.can_generate() if issubclass(found, PreTrainedModel) else found is AutoModelForCausalLM
    if not continues or config.is_encoder_decoder:
        raise CommandError(f"{model} is a {found.__name__}, no causal language model: eval cannot score it")
