"""Llama-shaped models of random weights, dense or packed, built on the device; and one step of decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_spqr.bench import weights
from hf_spqr.nn import PackedLinear

KINDS = ("bf16", "spqr", "affine")


def llama(name: str, layers: int | None = None) -> LlamaConfig:
    """The shape of Llama 3.2 ``1b``, TinyLlama ``1.1b``, Llama 2 ``7b`` or ``70b``, with fewer layers if asked."""
    hidden, intermediate, all_layers, heads, kv_heads, vocabulary = {
        "1b": (2048, 8192, 16, 32, 8, 128256),
        "1.1b": (2048, 5632, 22, 32, 4, 32000),
        "7b": (4096, 11008, 32, 32, 32, 32000),
        "70b": (8192, 28672, 80, 64, 8, 32000),
    }[name]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers or all_layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=4096, tie_word_embeddings=name == "1b", dtype="bfloat16",
    )  # fmt: skip


def build(config: LlamaConfig, kind: str, device: str) -> LlamaForCausalLM:
    """A model in bf16 whose decoder linears are of ``kind``; embedding, head and norms are always dense.

    "spqr" is 3 bit in groups of 16 with 1 % of outliers, "affine" 4 bit in groups of 128.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if kind != "bf16":
        packed: Any = weights.spqr_linear if kind == "spqr" else weights.affine_linear
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.layers.set_submodule(name, packed(module.out_features, module.in_features, device=device))
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and weight.is_meta:
                module._parameters[name] = nn.Parameter(random_dense(weight, device), requires_grad=False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    with torch.device(device):  # its frequencies are computed, not drawn
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model.eval()


def random_dense(like: Tensor, device: str) -> Tensor:
    weight = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
    return weight.fill_(1) if weight.ndim == 1 else weight.normal_(std=weight.shape[1] ** -0.5)


def linear_bytes(config: LlamaConfig) -> int:
    """Bytes of one decoder layer's matrices in bf16."""
    hidden = config.hidden_size
    kv = hidden * config.num_key_value_heads // config.num_attention_heads
    return 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config.intermediate_size)


def read_per_token(model: LlamaForCausalLM) -> int:
    """Bytes of weights that a token needs: all but an embedding of its own, of which it reads one row."""
    total = sum(weight.nbytes for weight in model.parameters())
    return total if model.config.tie_word_embeddings else total - model.model.embed_tokens.weight.nbytes


def packed_modules(model: LlamaForCausalLM) -> int:
    return sum(isinstance(module, PackedLinear) for module in model.modules())


class Decoder:
    """Greedy decoding of one sequence into a static cache; its state is in tensors of fixed place, as graphs need."""

    def __init__(self, model: LlamaForCausalLM, tokens: int, device: str) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=tokens)
        self.token = torch.ones(1, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.columns = torch.arange(tokens, device=device)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Logits [1, 1, vocabulary] of the next token, which becomes the current one."""
        mask = (self.columns <= self.position)[None, None]  # four dimensions: taken as it is
        logits = self.model(self.token, mask, self.position, self.cache, use_cache=True).logits
        self.token.copy_(logits.argmax(-1))
        self.position.add_(1)
        return logits
