"""GPTQ v2 folders, as OmniQuant and GPTQModel write them, read into our format."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_spqr.errors import CheckpointError
from hf_spqr.formats import affine, gptq_v2
from hf_spqr.formats.affine import AffineLayout
from hf_spqr.integrations.export import export_model
from hf_spqr.integrations.gptq import load_gptq_v2, with_group_size
from hf_spqr.nn import AffineLinear
from tests.integrations.test_export import affine_model, logits
from tests.weights import random_affine


@pytest.fixture(params=[(4, 32, False), (3, -1, False), (2, 16, True)], ids=str)
def exported(request, tmp_path):
    bits, group_size, symmetric = request.param
    model = affine_model(bits, group_size, symmetric, skip=("layers.1.mlp.down_proj",))
    return model, export_model(model, tmp_path / "gptq", "gptq_v2"), bits, group_size


def test_read_and_saved_in_our_format(exported, tmp_path):
    model, folder, bits, group_size = exported
    loaded = load_gptq_v2(folder, dtype=torch.float32)
    config = loaded.config.quantization_config
    assert (config.quant_method, config.bits, config.group_size) == ("omniquant", bits, group_size)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)
    for name, module in model.named_modules():
        if isinstance(module, AffineLinear):
            mine = affine.unpack(module.layout, module.packed_tensors())
            theirs = affine.unpack(loaded.get_submodule(name).layout, loaded.get_submodule(name).packed_tensors())
            assert torch.equal(mine.dequantize(), theirs.dequantize()), name
    loaded.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again), logits(loaded))


def test_a_folder_without_a_config_needs_to_be_told(exported):
    model, folder, bits, group_size = exported
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="give bits and group_size"):
        load_gptq_v2(folder)
    loaded = load_gptq_v2(folder, bits, group_size, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)
    wrong = 8 if bits != 8 else 4
    with pytest.raises(CheckpointError, match=r"belong together|bits is not what|bits take"):
        load_gptq_v2(folder, wrong, group_size)


def test_other_formats_and_damage_are_refused(exported):
    _, folder, _, _ = exported
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"gptq_v2"', '"gptq"'))
    with pytest.raises(CheckpointError, match="version 1"):
        load_gptq_v2(folder)
    path.write_text(text)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.qzeros"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.qzeros"):
        load_gptq_v2(folder)


def test_groups_of_512_become_groups_of_128():
    weight = random_affine(AffineLayout(32, 1024, 3, 128))
    weight.scales[:, :4] = weight.scales[:, :1]
    weight.scales[:, 4:] = weight.scales[:, 4:5]
    weight.zeros[:, :4] = weight.zeros[:, :1]
    weight.zeros[:, 4:] = weight.zeros[:, 4:5]
    tensors = gptq_v2.encode(weight)
    wide = {
        "qweight": tensors["qweight"],
        "qzeros": tensors["qzeros"][::4],
        "scales": tensors["scales"][::4],
        "g_idx": torch.arange(1024, dtype=torch.int32) // 512,
    }
    read = with_group_size(gptq_v2.decode(3, wide), 128)
    assert torch.equal(read.dequantize(), weight.dequantize())
    with pytest.raises(ValueError, match="group_size is not what"):
        with_group_size(random_affine(AffineLayout(32, 96, 3, 32)), 64)
