"""One block of every architecture, weight-only and with activations, at a few training steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_spqr.calibration.blocks import find_blocks, record
from hf_spqr.methods.omniquant import preset, quantize_block
from hf_spqr.nn.dense import DENSE_CLASSES, features
from tests.tiny_models import ARCHITECTURES, tiny_model

# equivalent transforms of the last block, as counted by hand from the architecture
PAIRS = {"gpt2": 4, "olmo2": 3, "gpt_neox": 4, "falcon": 3, "cohere2": 4}


@pytest.mark.parametrize("kind", (*ARCHITECTURES, "gpt2"))
@pytest.mark.parametrize("name", ["W4A16g32", "W8A8"])
def test_every_architecture_is_quantized(kind: str, name: str) -> None:
    model = tiny_model(kind)
    torch.manual_seed(0)
    blocks = find_blocks(model)
    recording = record(model, blocks, [torch.randint(1, 250, (1, 24)) for _ in range(6)])
    block, hidden = blocks[-1].module, torch.cat(recording.hidden)
    kwargs = [call.kwargs for call in recording.calls[-1]]
    linears = {key: module for key, module in block.named_modules() if isinstance(module, DENSE_CLASSES)}
    params = replace(preset(name), epochs=2, batch_size=3)
    result = quantize_block(block, hidden, hidden, kwargs, params, linears)
    assert len(result.pairs) == (PAIRS.get(kind, 5) if params.transforms else 0), result.pairs
    assert result.loss_final <= result.loss_initial and result.skipped == 0
    spread = (result.outputs_fp - hidden).square().mean()
    assert (result.outputs_q - result.outputs_fp).square().mean() < 0.05 * spread
    for key, weight in result.weights.items():
        layout = weight.layout
        assert (layout.out_features, layout.in_features) == features(linears[key])
