"""Whether a folder on disk would load: the checks of a load, without one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from hf_spqr.errors import CheckpointError
from hf_spqr.integrations.checkpoint import read_contents
from hf_spqr.integrations.transformers import QUANTIZERS
from hf_spqr.report.model import empty_model, packed_config

__all__ = ["check_folder"]


def check_folder(folder: Path, files: Iterable[Path], trust_remote_code: bool = False) -> None:
    """Check that the weight ``files`` of ``folder`` are those of the model that its config.json describes.

    Only headers are read. A model whose code is in the folder is checked with ``trust_remote_code``, which runs it.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape, or the config is damaged.
    """
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = packed_config(folder, stored["quantization_config"])
    if config is None or ("auto_map" in stored and not trust_remote_code):
        return
    model, names = empty_model(folder, trust_remote_code), [str(file) for file in files]
    contents = read_contents(model, names)  # a load leaves out what the model has no place for, as of any checkpoint
    if contents.further:
        raise CheckpointError(
            f"{folder / 'config.json'} counts fewer blocks than the files hold, for example {min(contents.further)!r}:"
            " correct num_hidden_layers, or save the model again."
        )
    if contents.elsewhere:
        raise CheckpointError(
            f"{folder / 'config.json'} names {type(model).__name__}, which has no {min(contents.elsewhere)!r} as the"
            " files do: correct architectures, or save the model again."
        )
    QUANTIZERS[type(config)](config, pre_quantized=True).preprocess_model(model, checkpoint_files=names)
