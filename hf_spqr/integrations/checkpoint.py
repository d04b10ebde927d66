"""What a packed checkpoint holds, read from the headers of its safetensors files: no tensor data is touched.

The headers decide how the model is built, and everything that can be wrong with a file is found here, before loading.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_spqr.calibration.blocks import stored_parts
from hf_spqr.errors import CheckpointError
from hf_spqr.integrations.experts import check_experts
from hf_spqr.nn import dense
from hf_spqr.nn.experts import describe
from hf_spqr.report.checkpoint import read_headers
from hf_spqr.report.names import ExpertFinder, Renamer

__all__ = [
    "Contents", "Spec", "check_complete", "check_loaded", "check_order", "read_contents", "read_specs",
]  # fmt: skip

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a stored tensor."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PACKED = "packed"
"""The tensor that every packed layer has."""
PACKED_ONLY = ("packed", "outlier_row", "outlier", "perm")
"""Names that only packed layers use; beside them a packed layer has ``weight`` (empty) and perhaps ``bias``."""


@dataclass
class Contents:
    """A checkpoint seen with the names of the model it is loaded into.

    ``packed[module][tensor]`` are the tensors of packed layers; ``dense`` all other parameter names; ``modules`` maps
    a packed layer to its name in the file. ``experts[module][projection][expert][tensor]`` are those of packed
    experts. ``further`` are packed layers of blocks after the model's last one, ``elsewhere`` those of parts that the
    model does not have: the decoder, where it is an encoder.
    """

    packed: dict[str, dict[str, Spec]] = field(default_factory=lambda: defaultdict(dict))
    dense: set[str] = field(default_factory=set)
    modules: dict[str, str] = field(default_factory=dict)
    experts: dict[str, dict[str, dict[int, dict[str, Spec]]]] = field(default_factory=dict)
    further: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)


def read_specs(files: Iterable[str]) -> dict[str, Spec]:
    """Shape and dtype of every tensor in ``files`` by name.

    Raises:
        CheckpointError: a file is not safetensors, is truncated or has a damaged header.
    """
    specs: dict[str, Spec] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"{file}: packed checkpoints are read from .safetensors files only.")
        for name, info in read_headers(file).items():
            specs[name] = info.shape, DTYPES.get(info.dtype, torch.uint8)
    return specs


def read_contents(model: nn.Module, files: Iterable[str]) -> Contents:
    """Headers of ``files`` with the names that their tensors get in ``model`` (still unpacked, on meta).

    Blocks after the last one of ``model`` (``num_hidden_layers=``) are left out, and so are parts that it does not
    have (the encoder, where it is a decoder); Transformers reports them.

    Raises:
        CheckpointError: a damaged file, a packed tensor that belongs to no linear layer of the model, or a packed
            layer with a tensor too many.
    """
    specs = read_specs(files)
    rename = Renamer(model)
    prefixes = {name.rpartition(".")[0] for name in specs if name.rpartition(".")[2] == PACKED}
    find_expert = ExpertFinder(model, rename)
    is_further, is_elsewhere = _further_blocks(model), _missing_parts(model)
    contents = Contents()
    stray = []
    for name in sorted(specs):
        module, _, leaf = name.rpartition(".")
        place = find_expert(module) if module in prefixes else None
        if place is not None:
            experts, projection, number = place
            contents.experts.setdefault(experts, {}).setdefault(projection, {}).setdefault(number, {})[leaf] = specs[
                name
            ]
            continue
        if module not in prefixes and leaf not in PACKED_ONLY:
            contents.dense.update(rename(name))
            continue
        target = rename(f"{module}.weight")[0].rpartition(".")[0]
        if module in prefixes and is_further(target):
            contents.further.add(module)
            continue
        if is_elsewhere(target):
            contents.elsewhere.add(module)
            continue
        if module not in prefixes or not _is_linear(model, target):
            stray.append(name)
            continue
        contents.packed[target][leaf] = specs[name]
        contents.modules[target] = module
    if not contents.packed and not contents.experts:  # then it is all of another model
        stray += contents.elsewhere
    stray = [name for name in stray if not _ignored(name, model, "_keys_to_ignore_on_load_unexpected")]
    contents.elsewhere = {
        name for name in contents.elsewhere if not _ignored(name, model, "_keys_to_ignore_on_load_unexpected")
    }
    if stray:
        raise CheckpointError(
            f"The checkpoint has {len(stray)} packed tensors that belong to no packed linear layer of"
            f" {type(model).__name__}, for example {stray[0]!r}: a tensor is missing beside them, or the checkpoint is"
            " of another model."
        )
    return contents


def check_complete(model: nn.Module, contents: Contents, starts: Iterable[str], allowed: Mapping[str, Any]) -> None:
    """Check that nothing is missing from the decoder and nothing is left over in packed layers.

    Args:
        model: the model, still unpacked.
        contents: see :func:`read_contents`.
        starts: starts of the names of parameters that must be there, but for those tied to one that is.
        allowed: names of the tensors that a packed layer must have; ``perm`` and ``bias`` come besides.

    Raises:
        CheckpointError: a tensor is missing, left over, or the empty ``weight`` is not empty.
    """
    if not contents.packed and not contents.experts:
        raise CheckpointError(
            "The config says that this checkpoint is quantized, but it has no packed tensors. Remove"
            " quantization_config from config.json if the weights are not quantized."
        )
    for module, tensors in contents.packed.items():
        linear = model.get_submodule(module)
        needed = {*allowed, "weight", *(["bias"] if linear.bias is not None else [])}
        wrong = needed - set(tensors)
        if wrong:
            raise CheckpointError(f"The checkpoint lacks {module}.{min(wrong)}: it is incomplete or damaged.")
        extra = set(tensors) - needed - {"perm"}
        if extra:
            raise CheckpointError(
                f"The checkpoint has a tensor {module}.{min(extra)} that a packed layer does not know: it was written"
                " by another version or is damaged."
            )
        if tensors["weight"][0] != (0,):
            raise CheckpointError(f"{module}.weight should be empty beside packed tensors, it is {tensors['weight']}.")
    for module in contents.experts:
        check_experts(module, describe(model.get_submodule(module)), contents.experts[module], allowed)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name, _ in model.named_parameters():
        inside = name.startswith(tuple(starts)) and name.rpartition(".")[0] not in contents.packed
        if not inside or {name, tied.get(name)} & contents.dense:
            continue
        if not _ignored(name, model, "_keys_to_ignore_on_load_missing"):
            raise CheckpointError(f"The checkpoint lacks {name}: it is incomplete, damaged, or of another model.")


def check_loaded(model: nn.Module, starts: Iterable[str]) -> None:
    """Check that all parameters of an unquantized model whose names begin so came from its checkpoint.

    Transformers fills those that a checkpoint lacks at random and only warns. Raises CheckpointError.
    """
    for name, parameter in model.named_parameters():
        missing = name.startswith(tuple(starts)) and not getattr(parameter, "_is_hf_initialized", False)
        if missing and not _ignored(name, model, "_keys_to_ignore_on_load_missing"):
            raise CheckpointError(
                f"The checkpoint of the model to quantize lacks {name}, which would be random: it is incomplete,"
                " damaged, or of another model."
            )


def check_order(name: str, expected: bool | None, found: bool) -> None:
    """Raise CheckpointError unless layer ``name`` has a column order exactly if the config says so (None: unknown)."""
    if expected is not None and expected != found:
        raise CheckpointError(
            f"{name}: the config says that act_order is {expected}, but the checkpoint has"
            f" {'a' if found else 'no'} tensor 'perm': it is incomplete or damaged."
        )


def _further_blocks(model: nn.Module) -> Callable[[str], bool]:
    """Says of the name of a module whether it lies in a block after the last one of ``model``."""
    lists = {start.removesuffix("."): model.get_submodule(start.removesuffix(".")) for start in stored_parts(model)}
    counts = {name: len(part) for name, part in lists.items() if isinstance(part, nn.ModuleList)}

    def is_further(name: str) -> bool:
        rests = ((name.removeprefix(f"{path}.").partition(".")[0], count) for path, count in counts.items())
        return any(number.isdigit() and int(number) >= count for number, count in rests)

    return is_further


def _missing_parts(model: nn.Module) -> Callable[[str], bool]:
    """Says of the name of a module whether it lies in a part that ``model`` does not have, outside of its blocks.

    Those are checked for themselves (:func:`check_complete`): a checkpoint of another model lacks something in them.
    """
    lists = tuple(stored_parts(model))
    names = {name for name, _ in model.named_modules()}

    def is_missing(name: str) -> bool:
        return name not in names and not name.startswith(lists)

    return is_missing


def _is_linear(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), dense.DENSE_CLASSES)
    except AttributeError:
        return False


def _ignored(name: str, model: nn.Module, attribute: str) -> bool:
    return any(re.search(pattern, name) for pattern in getattr(model, attribute, None) or ())
