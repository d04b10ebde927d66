"""Names and tensors of packed experts: one by one in the file, under their original names, and fused in the model.

A file holds ``<experts>.7.gate_proj.packed`` and so on, where ``gate_proj`` is what the original checkpoint calls it
(``w1`` in Mixtral); the model holds ``<experts>.packed.gate_proj.packed``. Transformers' weight converters join the
former to the latter on load; on save they are taken apart here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter

from hf_spqr.errors import CheckpointError
from hf_spqr.nn.experts import ExpertsKind, PackedExperts
from hf_spqr.report.names import file_names

__all__ = [
    "JoinExperts",
    "check_experts",
    "default_conversions",
    "experts_converters",
    "packed_experts",
    "restore_converters",
    "split_experts",
]


class JoinExperts(ConversionOps):
    """Fuses one tensor of all experts (of those that this rank holds): stacked, or joined end to end where its length
    differs between them."""

    def __init__(self, ragged: bool) -> None:
        self.ragged = ragged

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        experts = model.get_submodule(full_layer_name.rsplit(".packed.", 1)[0])
        tensors = input_dict.pop(source_patterns[0])[slice(*experts.held) if experts.held else slice(None)]
        return {target_patterns[0]: torch.cat(tensors) if self.ragged else torch.stack(tensors)}


def check_experts(
    module: str, kind: ExpertsKind | None, found: Mapping[str, Mapping[int, Mapping[str, Any]]], needed: Iterable[str]
) -> None:
    """Raise CheckpointError unless every projection of every expert of ``module`` has the ``needed`` tensors only."""
    assert kind is not None
    for projection in kind.projections:
        for expert in range(kind.experts):
            tensors = set(found.get(projection, {}).get(expert, ()))
            missing, extra = set(needed) - tensors, tensors - {*needed, "perm"}
            if missing:
                raise CheckpointError(
                    f"The checkpoint lacks {min(missing)!r} of {projection} of expert {expert} of {module}: it is"
                    " incomplete or damaged."
                )
            if extra:
                raise CheckpointError(
                    f"The checkpoint has a tensor {min(extra)!r} for {projection} of expert {expert} of {module} that"
                    " packed experts do not know: it was written by another version or is damaged."
                )


def packed_experts(model: nn.Module) -> dict[str, PackedExperts]:
    """The packed experts modules of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}


def experts_converters(model: nn.Module) -> list[WeightConverter]:
    """What loads the tensors of single experts into the packed experts modules of ``model``."""
    found = {}
    for name, module in packed_experts(model).items():
        last = name.rpartition(".")[2]
        stored = file_names(model, name, module.kind)
        for projection, linear in module.linears().items():
            for tensor in linear.packed_tensors():
                source = f".{last}.*.{stored[projection]}.{tensor}"
                found[source] = (f".{last}.packed.{projection}.{tensor}", tensor in linear.ragged)
    return [WeightConverter([s], [target], [JoinExperts(ragged)]) for s, (target, ragged) in found.items()]


def default_conversions(model: nn.Module) -> list[Any]:
    """The conversions that Transformers reverses when it saves a model that did not come from ``from_pretrained``."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
    return [entry for entry in conversions if not isinstance(entry, PrefixChange)]


def restore_converters(model: Any) -> None:
    """Save experts one by one again, as in the original checkpoint, after they have been dequantized."""
    before = [entry for entry in model._weight_conversions or [] if not isinstance(entry, WeightConverter)]
    model._weight_conversions = before + [c for c in default_conversions(model) if isinstance(c, WeightConverter)]


def split_experts(
    model: nn.Module, gather: Callable[[Any, Any], list[Any] | None] | None = None
) -> dict[str, Tensor] | None:
    """The state of ``model`` as it is written to a file, experts one by one; None where it has no packed experts.

    ``gather``: what joins the experts that the ranks of a group hold, on the first of them.

    Raises:
        CheckpointError: experts are offloaded.
    """
    experts = packed_experts(model)
    if not experts:
        return None
    state = model.state_dict()
    for name, module in experts.items():
        stored = file_names(model, name, module.kind)
        for projection, linear in module.linears().items():
            if linear.packed.is_meta:
                raise CheckpointError(f"{name} is offloaded: load the model without offload to save it.")
            for tensor in linear.packed_tensors():
                del state[f"{name}.packed.{projection}.{tensor}"]
            experts_here = linear.split()
            if module.held is not None and gather is not None:
                parts = gather([{k: v.cpu() for k, v in one.items()} for one in experts_here], module.group)
                experts_here = [one for part in parts or [] for one in part]
            for expert, tensors in enumerate(experts_here):
                for tensor, value in tensors.items():
                    state[f"{name}.{expert}.{stored[projection]}.{tensor}"] = value.clone()
    return state
