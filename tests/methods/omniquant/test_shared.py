"""Against reference runs of the original's code on a small trained model (first block; all blocks: benchmarks/)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_spqr.calibration.blocks import find_blocks, record
from hf_spqr.methods.omniquant import BlockResult, OmniQuantParams, preset, quantize_block
from hf_spqr.methods.omniquant.runner import BlockRunner

pytestmark = pytest.mark.shared
# held-out error of block 0: rounding to nearest, and OmniQuant's own code, 16 x 128 calibration tokens
PUBLISHED = {
    "W2A16": (0.2259, 0.1406),
    "W2A16g64": (0.1362, 0.0742),
    "W3A16": (0.0398, 0.0250),
    "W4A4": (0.0786, 0.0666),
}


@pytest.fixture(scope="module")
def first_block(shared_dir: Path) -> tuple[nn.Module, Tensor, Tensor, Any]:
    fixtures = shared_dir / "fixtures"
    split = torch.load(fixtures / "tiny_llama" / "split.pt")
    model = AutoModelForCausalLM.from_pretrained(fixtures / "tiny_llama", attn_implementation="sdpa").eval()
    blocks = find_blocks(model)
    calib, held = (record(model, blocks, [split[name]]) for name in ("calib", "eval"))
    kwargs = record(model, blocks, [split["calib"][:1]]).calls[0][0].kwargs
    return blocks[0].module, calib.hidden[0], held.hidden[0], kwargs


def held_out_error(first_block: tuple[nn.Module, Tensor, Tensor, Any], params: OmniQuantParams) -> float:
    block, calib, held, kwargs = first_block
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    result: BlockResult = quantize_block(block, calib, calib, kwargs, params, linears)
    runner = BlockRunner(block, kwargs, list(linears))
    tensors = {f"{name}.weight": weight.dequantize() for name, weight in result.weights.items()} | result.folded
    with torch.no_grad():
        target = runner(held, range(len(held)))
        out = runner(held, range(len(held)), tensors, params.act_bits, params.act_bits)
    return float(F.mse_loss(out, target))


@pytest.mark.parametrize("name", PUBLISHED)
def test_rounding_to_nearest_is_the_same(first_block: tuple[nn.Module, Tensor, Tensor, Any], name: str) -> None:
    params = replace(preset(name), rounding=False, lwc=False, let=False, epochs=0)
    assert held_out_error(first_block, params) == pytest.approx(PUBLISHED[name][0], rel=2e-3)


def test_a_short_training_with_rounding_is_past_the_published(
    first_block: tuple[nn.Module, Tensor, Tensor, Any],
) -> None:
    assert held_out_error(first_block, replace(preset("W3A16"), epochs=12)) < 0.5 * PUBLISHED["W3A16"][1]
