"""Models whose activations are quantized: every packed layer's input, and q, k, v through the attention registry."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_spqr.config import OmniQuantConfig
from hf_spqr.formats.tokens import fake_quantize_activation
from hf_spqr.nn import AffineGroupedLinear, AffineLinear

__all__ = ["enforce", "register_attention", "release"]

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
    """sdpa attention on q, k, v [batch, heads, tokens, size] quantized per token and head, after rotary embeddings."""
    q, k, v = (fake_quantize_activation(x, bits, symmetric) for x in (query, key, value))
    return sdpa_attention_forward(module, q, k, v, *args, **kwargs)


def register_attention() -> None:
    """Make the attention functions known to Transformers."""
    for bits, symmetric in SCHEMES:
        name = attention_name(bits, symmetric)
        AttentionInterface.register(name, partial(_attention, bits=bits, symmetric=symmetric))
        AttentionMaskInterface.register(name, sdpa_mask)


def enforce(model: Any, config: OmniQuantConfig) -> None:
    """Make the packed layers and the attention of ``model`` quantize their inputs as the config says."""
    if config.act_bits is None:
        return
    for module in model.modules():
        if isinstance(module, AffineLinear | AffineGroupedLinear):
            module.act_bits, module.act_sym = config.act_bits, config.act_sym
    if config.params().quantize_attention:
        model.set_attn_implementation(attention_name(config.act_bits, config.act_sym))


def release(model: Any) -> None:
    """Undo :func:`enforce` on the attention, for a model whose layers are packed no more."""
    names = {attention_name(*scheme) for scheme in SCHEMES}
    if model.config._attn_implementation in names:
        model.set_attn_implementation("sdpa")
