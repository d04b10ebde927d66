"""Llama-shaped models of random weights, dense or packed, built on the device; and one step of decoding."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_spqr.formats import affine, spqr
from hf_spqr.formats.affine import AffineLayout, AffineWeight
from hf_spqr.formats.spqr import SpQRLayout, SpQRWeight
from hf_spqr.nn import AffineLinear, PackedLinear, SpQRLinear

KINDS = ("bf16", "spqr", "affine")
OUTLIERS = 0.01
SAMPLE_ROWS = 64
"""Rows that are packed; the others repeat them. No kernel can tell, and packing a whole model would take minutes."""


def llama(name: str, layers: int | None = None) -> LlamaConfig:
    """The shape of Llama ``7b`` or ``70b``, with fewer layers if asked."""
    hidden, intermediate, all_layers, heads, kv_heads = {
        "7b": (4096, 11008, 32, 32, 32),
        "70b": (8192, 28672, 80, 64, 8),
    }[name]
    return LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers or all_layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip


def build(config: LlamaConfig, kind: str, device: str) -> LlamaForCausalLM:
    """A model in bf16 whose decoder linears are of ``kind``; embedding, head and norms are always dense."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    sample_spqr.cache_clear()
    sample_affine.cache_clear()
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if kind != "bf16":
        packed = spqr_linear if kind == "spqr" else affine_linear
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.layers.set_submodule(name, packed(module.out_features, module.in_features, device))
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and weight.is_meta:
                module._parameters[name] = nn.Parameter(random_dense(weight, device), requires_grad=False)
    with torch.device(device):  # its frequencies are computed, not drawn
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model.eval()


def random_dense(like: Tensor, device: str) -> Tensor:
    weight = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
    return weight.fill_(1) if weight.ndim == 1 else weight.normal_(std=weight.shape[1] ** -0.5)


@lru_cache
def sample_spqr(columns: int, device: str) -> Tensor:
    layout = SpQRLayout(SAMPLE_ROWS, columns)
    groups = (SAMPLE_ROWS, layout.groups)
    second = torch.tensor([0.05 * columns**-0.5, -2, 1, 0], dtype=torch.float16, device=device)
    weight = SpQRWeight(
        layout,
        random_codes((SAMPLE_ROWS, columns), layout.bits, device),
        random_codes(groups, layout.stat_bits, device),
        random_codes(groups, layout.stat_bits, device),
        second.expand(layout.row_blocks, layout.second_groups, 4).contiguous(),
        torch.zeros(SAMPLE_ROWS + 1, dtype=torch.int32, device=device),
        torch.zeros(0, dtype=torch.int32, device=device),
        torch.zeros(0, dtype=torch.float16, device=device),
    )
    return spqr.pack(weight)["packed"]


@lru_cache
def sample_affine(columns: int, device: str) -> Tensor:
    layout = AffineLayout(SAMPLE_ROWS, columns, 4, 128)
    groups = (SAMPLE_ROWS, layout.groups)
    weight = AffineWeight(
        layout,
        random_codes((SAMPLE_ROWS, columns), 4, device),
        torch.full(groups, 0.2 * columns**-0.5, dtype=torch.float16, device=device),
        random_codes(groups, 4, device),
    )
    return affine.pack(weight)["packed"]


def random_codes(shape: tuple[int, int], bits: int, device: str) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, device=device)


def repeat_rows(sample: Tensor, layout: SpQRLayout | AffineLayout) -> Tensor:
    """[row_blocks, words]: memory of its own, so that a cache holds no more of it than of any matrix."""
    return sample.repeat(-(-layout.row_blocks // sample.shape[0]), 1)[: layout.row_blocks].contiguous()


def spqr_linear(rows: int, columns: int, device: str) -> SpQRLinear:
    """3 bit, groups of 16, 1 % of outliers: one at random in each of equal stretches of a row."""
    layout = SpQRLayout(rows, columns)
    per_row = max(1, round(OUTLIERS * columns))
    stretch = columns // per_row
    column = torch.randint(0, stretch, (rows, per_row), dtype=torch.int32, device=device)
    column += torch.arange(per_row, dtype=torch.int32, device=device) * stretch
    tensors = {
        "packed": repeat_rows(sample_spqr(columns, device), layout),
        "outlier_row": torch.arange(rows + 1, dtype=torch.int32, device=device) * per_row,
        "outlier": (column.flatten() | (0x2000 << 16)).contiguous(),  # 2^-7 in float16
    }
    return SpQRLinear(layout, tensors, dtype=torch.bfloat16)


def affine_linear(rows: int, columns: int, device: str) -> AffineLinear:
    """4 bit, groups of 128."""
    layout = AffineLayout(rows, columns, 4, 128)
    packed = repeat_rows(sample_affine(columns, device), layout)
    return AffineLinear(layout, {"packed": packed}, dtype=torch.bfloat16)


def linear_bytes(config: LlamaConfig) -> int:
    """Bytes of one decoder layer's matrices in bf16."""
    hidden = config.hidden_size
    kv = hidden * config.num_key_value_heads // config.num_attention_heads
    return 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config.intermediate_size)


def read_per_token(model: LlamaForCausalLM) -> int:
    """Bytes of weights that a token needs: all but the embedding, of which it reads one row."""
    total = sum(weight.nbytes for weight in model.parameters())
    return total - model.model.embed_tokens.weight.nbytes


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
        logits = self.model(
            input_ids=self.token, attention_mask=mask, position_ids=self.position, past_key_values=self.cache,
            use_cache=True,
        ).logits  # fmt: skip
        self.token.copy_(logits.argmax(-1))
        self.position.add_(1)
        return logits
