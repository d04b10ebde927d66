"""Models whose activations are quantized: every packed layer's input, and q, k, v through the attention registry."""

from __future__ import annotations

import warnings
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_spqr.calibration.blocks import attending_parts
from hf_spqr.config import OmniQuantConfig
from hf_spqr.errors import UnsupportedLayerError
from hf_spqr.formats.tokens import fake_quantize_activation
from hf_spqr.nn import AffineGroupedLinear, AffineLinear

__all__ = ["enforce", "install", "register_attention", "release"]

SCHEMES = [(bits, symmetric) for bits in range(2, 9) for symmetric in (False, True)]


def attention_name(bits: int, symmetric: bool) -> str:
    """Name of the attention function whose q, k and v have ``bits`` bits."""
    return f"hf_spqr_a{bits}_sym" if symmetric else f"hf_spqr_a{bits}"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    bits: int,
    symmetric: bool,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa attention on q, k, v [batch, heads, tokens, size] quantized per token and head, after rotary embeddings.

    Raises UnsupportedLayerError for the paged cache of continuous batching, whose tokens are of several texts.
    """
    if kwargs.get("cache") is not None:
        raise UnsupportedLayerError(
            "Continuous batching does not run models with quantized attention: use generate() with a padded batch."
        )
    q, k, v = (fake_quantize_activation(x, bits, symmetric) for x in (query, key, value))
    return sdpa_attention_forward(module, q, k, v, *args, **kwargs)


def register_attention() -> None:
    """Make the attention functions known to Transformers."""
    for bits, symmetric in SCHEMES:
        name = attention_name(bits, symmetric)
        AttentionInterface.register(name, partial(_attention, bits=bits, symmetric=symmetric))
        AttentionMaskInterface.register(name, sdpa_mask)


def enforce(model: Any, config: OmniQuantConfig) -> None:
    """Make the packed layers and the attention of the blocks of ``model`` quantize their inputs as the config says."""
    if config.act_bits is None:
        return
    for module in model.modules():
        if isinstance(module, AffineLinear | AffineGroupedLinear):
            module.act_bits, module.act_sym = config.act_bits, config.act_sym
    if config.params().quantize_attention:
        name = attention_name(config.act_bits, config.act_sym)
        asked = {part.config._attn_implementation for part in attending_parts(model)}
        for other in asked - {None, "sdpa", name}:
            _warn(other, name)
        _attend(model, name)


def release(model: Any) -> None:
    """Undo :func:`enforce` on the attention, for a model whose layers are packed no more."""
    if _quantized_attention(model):
        _attend(model, "sdpa")


def install() -> None:
    """Make ``set_attn_implementation`` keep quantized attention: a W4A4 model never runs as W4A16 unnoticed.

    In the class, because Transformers has no place for it in a quantizer.
    """
    original = PreTrainedModel.set_attn_implementation
    if getattr(original, "keeps_quantized_attention", False):
        return

    @wraps(original)
    def set_attn_implementation(self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        name = _quantized_attention(self) if _quantizes_activations(self) else None
        original(self, attn_implementation, *args, **kwargs)
        if name is not None and _quantized_attention(self) != name:
            _warn(attn_implementation, name)
            _attend(self, name)

    set_attn_implementation.keeps_quantized_attention = True  # type: ignore[attr-defined]
    PreTrainedModel.set_attn_implementation = set_attn_implementation  # type: ignore[method-assign]


def _attend(model: nn.Module, name: str) -> None:
    for part in attending_parts(model):
        part.set_attn_implementation(name)


def _quantized_attention(model: PreTrainedModel) -> str | None:
    """The name of the attention function of ``model``, or of a part of it, that quantizes; None without one."""
    names = {attention_name(*scheme) for scheme in SCHEMES}
    parts = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next((name for part in parts if (name := part.config._attn_implementation) in names), None)


def _quantizes_activations(model: nn.Module) -> bool:
    packed = (module for module in model.modules() if isinstance(module, AffineLinear | AffineGroupedLinear))
    return any(module.act_bits is not None for module in packed)


def _warn(asked: Any, name: str) -> None:
    warnings.warn(
        f"attn_implementation={asked!r} is not used in the blocks of this model: it was calibrated with quantized q, k"
        f" and v, which {name!r} computes (with sdpa).",
        stacklevel=3,
    )
