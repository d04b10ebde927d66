"""Write quantized models in other people's formats: official SpQR, GPTQ v2 and compressed-tensors.

The affine formats are then served by vLLM, SGLang and plain Transformers without this package.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_spqr.errors import UnsupportedLayerError
from hf_spqr.formats import affine, compressed_tensors, gptq_v2, official_spqr, spqr
from hf_spqr.formats.affine import AffineLayout, AffineWeight
from hf_spqr.formats.spqr import SpQRLayout
from hf_spqr.nn import GroupedLinear, PackedExperts, PackedLinear
from hf_spqr.report.names import file_names

__all__ = ["FORMATS", "export_model"]


@dataclass(frozen=True)
class Matrix:
    """A packed matrix of a model, of a linear layer or of one expert: its tensors in our format, on the host."""

    layout: AffineLayout | SpQRLayout
    tensors: dict[str, Tensor]
    bias: Tensor | None
    dtype: torch.dtype


Layers = dict[str, Matrix]
Written = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]
"""Tensors by layer and name, and the quantization_config of the written model."""


def export_model(model: Any, out: str | os.PathLike[str], format: str, *, max_shard_size: int | str = "50GB") -> Path:
    """Write ``model``, quantized by hf_spqr, into the folder ``out`` in another format; the model stays as it is.

    format: ``"spqr"`` (official SpQR, for 3-bit SpQR models in groups of 16), ``"gptq_v2"``, ``"compressed-tensors"``
    (``int-quantized`` where activations are quantized too or weights have 8 bits, else ``pack-quantized``).

    Raises:
        UnsupportedLayerError: a layer cannot be said in that format; the message names it. Nothing is written then.
    """
    if format not in FORMATS:
        raise UnsupportedLayerError(f"format={format!r}: use one of {', '.join(map(repr, FORMATS))}.")
    layers = packed_matrices(model)
    if not layers:
        raise UnsupportedLayerError("The model has no packed layers: export takes models that hf_spqr has quantized.")
    tensors, config = FORMATS[format](model, layers)
    dtype = torch.float16 if format == "spqr" else None
    state = _other_tensors(model, layers, dtype)
    for name, parts in tensors.items():
        bias = layers[name].bias
        if bias is not None:
            parts = {**parts, "bias": bias.to(dtype or bias.dtype)}
        state.update({f"{name}.{leaf}": tensor for leaf, tensor in parts.items()})
    with _as_foreign(model, config):
        model.save_pretrained(out, state_dict=state, max_shard_size=max_shard_size)
    if dtype is not None:
        path = Path(out) / "config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        written["dtype"] = str(dtype).removeprefix("torch.")
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(out)


def packed_matrices(model: nn.Module) -> Layers:
    """The packed matrices of ``model`` by the names that they have in a file, experts one by one."""
    found: Layers = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            if module.replaces is not nn.Linear:
                raise UnsupportedLayerError(
                    f"{name} stands in for a {module.replaces.__name__}; other formats know linear layers only."
                )
            bias = None if module.bias is None else module.bias.detach()
            found[name] = Matrix(module.layout, _on_host(name, module.packed_tensors()), bias, module.weight.dtype)
        elif isinstance(module, PackedExperts):
            stored = file_names(model, name, module.kind)
            dtype = module.down_proj.dtype
            for projection, linear in module.linears().items():
                _on_host(name, linear.packed_tensors())
                for expert, tensors in enumerate(linear.split()):
                    matrix = Matrix(linear.layout, _on_host(name, tensors), None, dtype)
                    found[f"{name}.{expert}.{stored[projection]}"] = matrix
    return found


def to_official_spqr(model: nn.Module, layers: Layers) -> Written:
    """Official SpQR. Its reader wants float16, so all other tensors are written in it."""
    if any(isinstance(module, PackedExperts) for module in model.modules()):
        raise UnsupportedLayerError("Official SpQR knows no experts: keep this model in our format.")
    tensors = {}
    for name, matrix in layers.items():
        if not isinstance(matrix.layout, SpQRLayout):
            raise UnsupportedLayerError(f"{name} is not of SpQR: official SpQR holds SpQR models only.")
        if matrix.bias is not None:
            raise UnsupportedLayerError(f"{name} has a bias, which official SpQR does not know.")
        tensors[name] = _written(name, official_spqr.encode, spqr.unpack(matrix.layout, matrix.tensors))
    shapes = {f"{name}.{leaf}.shape": t.numel() for name, parts in tensors.items() for leaf, t in parts.items()}
    others = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in layers]
    config = {
        "quant_method": "spqr",
        "bits": official_spqr.BITS,
        "beta1": official_spqr.TILE,
        "beta2": official_spqr.TILE,
        "outlier_values": "residual",
        "modules_to_not_convert": others,
        "shapes": shapes,
    }
    return tensors, config


def to_gptq_v2(model: nn.Module, layers: Layers) -> Written:
    """GPTQ v2 with one width and group size for all layers."""
    _refuse_activations(model, "GPTQ v2")
    weights = _affine_weights(layers, "GPTQ v2")
    kinds = {(w.layout.bits, w.layout.group_size, w.layout.symmetric) for w in weights.values()}
    if len(kinds) > 1:
        raise UnsupportedLayerError(
            f"GPTQ v2 is written with one width and group size for all layers; this model has {sorted(kinds)}."
            " Use compressed-tensors."
        )
    bits, group_size, symmetric = kinds.pop()
    tensors = {name: _written(name, gptq_v2.encode, weight) for name, weight in weights.items()}
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": any(weight.perm is not None for weight in weights.values()),
        "checkpoint_format": "gptq_v2",
        "lm_head": False,
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in _left_alone(model, layers)},
    }
    return tensors, config


def to_compressed_tensors(model: nn.Module, layers: Layers) -> Written:
    """compressed-tensors: a group of the config for every kind of layer that occurs."""
    activations = _activations(model)
    groups: dict[AffineLayout, dict[str, Any]] = {}
    tensors = {}
    kinds = set()
    for name, weight in _affine_weights(layers, "compressed-tensors").items():
        lay = weight.layout
        plain = lay.bits == 8 or activations is not None
        write = compressed_tensors.int_quantized if plain else compressed_tensors.pack_quantized
        kinds.add("int-quantized" if plain else "pack-quantized")
        tensors[name] = _written(name, partial(write, dtype=layers[name].dtype), weight)
        kind = AffineLayout(1, lay.group_size if lay.group_size > 0 else 1, lay.bits, lay.group_size, lay.symmetric)
        group = groups.setdefault(kind, _scheme(kind, activations, "int-quantized" if plain else "pack-quantized"))
        group["targets"].append(name)
    if len(groups) == 1:
        next(iter(groups.values()))["targets"] = ["Linear"]
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "ignore": _left_alone(model, layers),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if any("weight_packed" in parts and "weight_zero_point" in parts for parts in tensors.values()):
        # Transformers with compressed-tensors 0.20 reads packed zero points only on the way to dense weights; on the
        # other way, which makes them dense at the first forward pass, it stops with a shape mismatch. That way knows
        # one scheme for all layers, and would read the others wrongly.
        if len(groups) > 1:
            raise UnsupportedLayerError(
                "This model has layers of several kinds (overrides), and asymmetric ones of less than 8 bits among"
                " them. Transformers reads such layers from compressed-tensors only where all are alike: quantize with"
                " sym=True, or without overrides."
            )
        config["dequantize"] = True
    return tensors, config


FORMATS: dict[str, Callable[[nn.Module, Layers], Written]] = {
    "spqr": to_official_spqr,
    "gptq_v2": to_gptq_v2,
    "compressed-tensors": to_compressed_tensors,
}


def _scheme(layout: AffineLayout, activations: dict[str, Any] | None, format: str) -> dict[str, Any]:
    per_channel = layout.per_channel
    weights = {
        "num_bits": layout.bits,
        "type": "int",
        "symmetric": layout.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else layout.group_size,
        "dynamic": False,
    }
    return {"targets": [], "weights": weights, "input_activations": activations, "format": format}


def _activations(model: nn.Module) -> dict[str, Any] | None:
    """The activation scheme of a weight-activation model in the words of compressed-tensors, else None."""
    config = _config_of(model)
    if getattr(config, "act_bits", None) is None:
        return None
    if config.params().quantize_attention:
        warnings.warn(
            "compressed-tensors cannot say that attention's q, k and v are quantized after the rotary embedding: the"
            " exported model leaves them in full precision and is a little better than this one.",
            stacklevel=2,
        )
    symmetric = config.act_sym
    return {"num_bits": config.act_bits, "type": "int", "symmetric": symmetric, "strategy": "token", "dynamic": True}


def _refuse_activations(model: nn.Module, format: str) -> None:
    bits = getattr(_config_of(model), "act_bits", None)
    if bits is not None:
        raise UnsupportedLayerError(
            f"{format} has no quantized activations; this model has {bits}-bit ones and would silently become another"
            " model. Use compressed-tensors."
        )


def _config_of(model: nn.Module) -> Any:
    return getattr(getattr(model, "config", None), "quantization_config", None)


def _on_host(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if any(tensor.is_meta for tensor in tensors.values()):
        raise UnsupportedLayerError(f"{name} is offloaded: load the model without offload to export it.")
    return {leaf: tensor.cpu() for leaf, tensor in tensors.items()}


def _affine_weights(layers: Layers, format: str) -> dict[str, AffineWeight]:
    weights = {}
    for name, matrix in layers.items():
        if not isinstance(matrix.layout, AffineLayout):
            raise UnsupportedLayerError(f"{name} is of SpQR: {format} holds affine models only, as OmniQuant gives.")
        weights[name] = affine.unpack(matrix.layout, matrix.tensors)
    return weights


def _written(name: str, write: Callable[[Any], dict[str, Tensor]], weight: Any) -> dict[str, Tensor]:
    try:
        return write(weight)
    except ValueError as error:
        raise UnsupportedLayerError(f"{name}: {error}.") from error


def _left_alone(model: nn.Module, layers: Layers) -> list[str]:
    """Linear layers that are not packed, and routers, which other programs build as linear layers."""
    dense = (nn.Embedding, PackedLinear)
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, dense)
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.dim() == 2
    ]


def _other_tensors(model: nn.Module, layers: Layers, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state of the model without its packed matrices; float tensors of ``dtype`` if given."""
    state: Mapping[str, Tensor] = model.state_dict()
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear | GroupedLinear)}
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):  # what answers for the dtype of the original, and is empty
            state = {
                key: t for key, t in state.items() if key not in (f"{name}.{module.kind.fused}", f"{name}.down_proj")
            }
    rest = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in packed}
    if dtype is None:
        return rest
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in rest.items()}


@contextmanager
def _as_foreign(model: Any, quantization_config: dict[str, Any]) -> Iterator[None]:
    """Let Transformers save the model under another quantization_config, and none of our code take part."""
    ours, quantizer = _config_of(model), model.__dict__.pop("hf_quantizer", None)
    dtype, architectures = model.config.dtype, model.config.architectures
    model.config.quantization_config = quantization_config
    try:
        yield
    finally:
        model.config.quantization_config = ours
        model.config.dtype, model.config.architectures = dtype, architectures
        if quantizer is not None:
            model.hf_quantizer = quantizer
