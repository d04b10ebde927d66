"""Equivalent transforms, proposed and verified on blocks of random tiny models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_spqr.calibration.blocks import find_blocks, record
from hf_spqr.methods.omniquant import find_pairs
from hf_spqr.methods.omniquant.pairs import apply_pair

BASE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
OPT = {key: value for key, value in BASE.items() if key not in ("num_key_value_heads", "head_dim")}
SMALL = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MLA = {key: value for key, value in BASE.items() if key != "head_dim"} | {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 2, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_shared_experts": 1,
}  # fmt: skip
# kinds of the pairs that each block has (norm, value, mlp, qk), and how many of them take a shift
EXPECTED: dict[str, tuple[dict[str, Any], tuple[int, int, int, int], int]] = {
    "llama": (BASE, (2, 1, 1, 1), 0),
    "mistral": (BASE, (2, 1, 1, 1), 0),
    "qwen2": (BASE, (2, 1, 1, 1), 0),
    "qwen3": (BASE, (2, 1, 1, 1), 0),
    "gemma2": (BASE, (2, 1, 1, 1), 0),
    "gemma3_text": (BASE, (2, 1, 1, 1), 0),
    "phi3": (BASE, (2, 1, 1, 1), 0),
    "opt": (dict(OPT, ffn_dim=96, word_embed_proj_dim=64), (2, 1, 1, 1), 3),
    "gpt_neox": (BASE, (2, 1, 0, 1), 3),
    "falcon": (dict(FALCON, multi_query=True, parallel_attn=True, new_decoder_architecture=False), (1, 1, 0, 1), 0),
    "cohere2": (BASE, (1, 1, 1, 1), 0),
    "olmo2": (BASE, (0, 1, 1, 1), 0),
    "gpt2": (SMALL, (2, 1, 0, 1), 3),
    "gptj": (dict(SMALL, rotary_dim=8), (1, 1, 0, 1), 0),
    "phi": (BASE, (1, 1, 0, 1), 2),
    "mixtral": (dict(BASE, num_local_experts=4, num_experts_per_tok=2), (2, 1, 0, 1), 0),
    "deepseek_v3": (MLA, (4, 0, 1, 0), 0),
    "gpt_oss": (dict(BASE, num_local_experts=4, num_experts_per_tok=2), (2, 1, 0, 1), 0),
}


def block_of(kind: str) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    """Last block of a random tiny model, and one recorded call of it."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**EXPECTED[kind][0])
    model = AutoModelForCausalLM.from_config(config).eval()
    blocks = find_blocks(model)
    recording = record(model, blocks, [torch.randint(5, 90, (2, 12))])
    call = recording.calls[-1][0]
    return blocks[-1].module, recording.hidden[0], call.kwargs


@pytest.mark.parametrize("kind", EXPECTED)
def test_pairs_are_found_and_leave_the_block_as_it_is(kind: str) -> None:
    block, hidden, kwargs = block_of(kind)
    before = copy.deepcopy(block.state_dict())
    pairs, _ = find_pairs(block, hidden, kwargs)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    counts = tuple(sum(pair.kind == name for pair in pairs) for name in ("norm", "value", "mlp", "qk"))
    assert counts == EXPECTED[kind][1], [pair.name for pair in pairs]
    assert sum(bool(pair.shifts) for pair in pairs) == EXPECTED[kind][2]

    # applied in float32 to the real parameters they move the output by rounding only
    tensors = dict(block.named_parameters())
    with torch.no_grad():
        reference = _first(block(hidden, **kwargs))
        for pair in pairs:
            scale = (torch.randn(pair.size) * 0.5).exp()
            shift = 0.1 * torch.randn(pair.size) if pair.shifts else None
            tensors.update(apply_pair(pair, tensors, scale, shift))
        moved = _first(torch.func.functional_call(block, tensors, (hidden,), kwargs))
    torch.testing.assert_close(moved, reference, rtol=1e-4, atol=1e-4)


def test_a_pair_that_only_looks_right_is_left_out() -> None:
    """up -> down across GELU is proportional nowhere; a second reader of v is caught by the verification."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            made = self.up(hidden_states)
            return hidden_states + self.down(made.relu()) + 1e-3 * made.square().mean(-1, keepdim=True)

    torch.manual_seed(0)
    pairs, rejected = find_pairs(Reader(), torch.randn(2, 8, 32), {})
    assert not pairs and rejected == ["up -> down"]


def test_a_block_that_refuses_float64_has_no_pairs() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.up(hidden_states) + torch.mm(hidden_states[0], torch.eye(8, dtype=torch.float32))

    pairs, rejected = find_pairs(Single(), torch.randn(1, 4, 8), {})
    assert not pairs and "float64" in rejected[0]


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
