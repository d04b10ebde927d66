"""Models whose activations are quantized: every packed layer's input, and q, k, v through the attention registry."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_spqr.config import OmniQuantConfig
from hf_spqr.nn import AffineGroupedLinear, AffineLinear
from hf_spqr.ops.activation import fake_quantize_activation

__all__ = ["enforce", "register_attention", "release"]

BITS = range(2, 9)


def attention_name(bits: int) -> str:
    """Name of the attention function whose q, k and v have ``bits`` bits."""
    return f"hf_spqr_a{bits}"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, bits: int, **kwargs: Any
) -> tuple[Tensor, None]:
    """sdpa attention on q, k, v [batch, heads, tokens, size] quantized per token and head, after rotary embeddings."""
    q, k, v = (fake_quantize_activation(x, bits) for x in (query, key, value))
    return sdpa_attention_forward(module, q, k, v, *args, **kwargs)


def register_attention() -> None:
    """Make the attention functions known to Transformers."""
    for bits in BITS:
        AttentionInterface.register(attention_name(bits), partial(_attention, bits=bits))
        AttentionMaskInterface.register(attention_name(bits), sdpa_mask)


def enforce(model: Any, config: OmniQuantConfig) -> None:
    """Make the packed layers and the attention of ``model`` quantize their inputs as the config says."""
    if config.act_bits is None:
        return
    for module in model.modules():
        if isinstance(module, AffineLinear | AffineGroupedLinear):
            module.act_bits = config.act_bits
    if config.params().quantize_attention:
        model.set_attn_implementation(attention_name(config.act_bits))


def release(model: Any) -> None:
    """Undo :func:`enforce` on the attention, for a model whose layers are packed no more."""
    names = {attention_name(bits) for bits in BITS}
    if model.config._attn_implementation in names:
        model.set_attn_implementation("sdpa")
