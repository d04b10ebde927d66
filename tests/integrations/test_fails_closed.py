"""A packed checkpoint that is damaged, incomplete, or met without the plugin never becomes a running model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_spqr import CheckpointError, SpQRConfig
from hf_spqr.integrations.transformers import quantize_model
from tests.architectures.matrix import METHODS
from tests.architectures.rows import ARCHITECTURES
from tests.tiny_models import tiny_model

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the quantized folder whose tensors were changed by a function."""

    def make(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        path = tmp_path / "damaged"
        shutil.copytree(folder, path)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})
        return path

    return make


def fails(path, message):
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(path)


def test_indices_of_a_layer_that_is_offloaded_to_disk(damaged, tmp_path):
    """They are read when the layer runs, by kernels that trust them."""

    def break_it(tensors):
        tensors["model.layers.1.mlp.up_proj.outlier"] |= 0xFFFF

    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj: damaged packed layer: an outlier lies"):
        AutoModelForCausalLM.from_pretrained(damaged(break_it), device_map=device_map, offload_folder=tmp_path / "off")


@pytest.mark.parametrize("leaf", ["packed", "outlier_row", "outlier", "weight"])
def test_missing_tensor(damaged, leaf):
    path = damaged(lambda t: t.pop(f"{UP}.{leaf}"))
    fails(path, r"incomplete|missing beside them")


def test_missing_layer(damaged):
    def drop(tensors):
        for name in [n for n in tensors if n.startswith(UP)]:
            del tensors[name]

    fails(damaged(drop), rf"lacks {UP}\.weight")


def test_missing_norm(damaged):
    fails(damaged(lambda t: t.pop("model.layers.1.input_layernorm.weight")), "lacks model.layers.1.input_layernorm")


@pytest.mark.parametrize("name", [f"{UP}.weight", "model.layers.1.input_layernorm.weight"])
def test_a_base_model_that_lacks_a_weight(name, texts, tokenizer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = SpQRConfig(dataset=texts, tokenizer=tokenizer, nsamples=2, seqlen=32)
    with pytest.raises(CheckpointError, match=rf"lacks {name}, which would be random"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_missing_order(damaged):
    path = damaged(lambda t: t.pop("model.layers.1.self_attn.o_proj.perm"))
    fails(path, "act_order is True, but the checkpoint has no tensor 'perm'")


def test_order_that_should_not_be_there(folder, tmp_path):
    fails(edit_config(folder, tmp_path, act_order=False), "act_order is False, but the checkpoint has a tensor")


def test_missing_shard(quantized, tmp_path):
    quantized.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    next(iter(sorted(tmp_path.glob("model-0000[3-9]*")))).unlink()
    with pytest.raises((CheckpointError, OSError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{UP}.scales", "does not know"),
        ("model.layers.0.input_layernorm.packed", "no packed linear layer"),
        ("model.layers.1.mlp.side_proj.packed", "no packed linear layer"),
        ("model.norm.outlier", "no packed linear layer"),
        (f"{UP}.bias", "does not know"),
    ],
)
def test_extra_tensor(damaged, name, message):
    fails(damaged(lambda t: t.update({name: torch.zeros(4, dtype=torch.int32)})), message)


def test_dense_weight_beside_packed(damaged):
    fails(damaged(lambda t: t.update({f"{UP}.weight": torch.zeros(96, 64)})), "should be empty")


def test_truncated_tensor(damaged):
    fails(damaged(lambda t: t.update({f"{UP}.packed": t[f"{UP}.packed"][:, :-16]})), f"{UP}: 'packed' should be")


def test_truncated_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    data = (folder / "model.safetensors").read_bytes()
    for size in (len(data) - 100, 5000, 4):
        (tmp_path / "cut" / "model.safetensors").write_bytes(data[:size])
        fails(tmp_path / "cut", "truncated or damaged")


def change_outliers(change):
    def apply(tensors):
        name = next(n for n in tensors if n.endswith(".outlier") and tensors[n].numel() > 2)
        change(tensors, name)

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda t, n: t.update({n: t[n][:-1]}),
        lambda t, n: t.update({n: t[n] | 0x7FFF}),
        lambda t, n: t.update({f"{n}_row": -t[f"{n}_row"]}),
        lambda t, n: t.update({f"{n}_row": t[f"{n}_row"][:-1]}),
    ],
    ids=["fewer values", "column too large", "counts fall", "rows missing"],
)
def test_outliers_that_kernels_cannot_trust(damaged, change):
    path = damaged(change_outliers(change))
    with pytest.raises((CheckpointError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(path)


def test_order_that_is_no_permutation(damaged):
    name = f"{UP}.perm"
    fails(damaged(lambda t: t.update({name: torch.full_like(t[name], 3)})), f"{UP}: damaged")


def edit_config(folder, tmp_path, **changes):
    shutil.copytree(folder, tmp_path / "edited")
    file = tmp_path / "edited" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))
    return tmp_path / "edited"


def test_future_version(folder, tmp_path):
    fails(edit_config(folder, tmp_path, format_version=2), "Install the version")


@pytest.mark.parametrize("changes", [{"bits": 4}, {"scale_bits": 5}, {"group_size": 8}])
def test_config_that_contradicts_the_file(folder, tmp_path, changes):
    fails(edit_config(folder, tmp_path, **changes), "should be")


def test_config_without_packed_tensors(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "plain")
    file = tmp_path / "plain" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "hf_spqr"}}
    file.write_text(json.dumps(config))
    fails(tmp_path / "plain", "no packed tensors")


def test_state_dict_instead_of_files(quantized):
    with pytest.raises(CheckpointError, match="from_pretrained"):
        type(quantized).from_pretrained(None, config=quantized.config, state_dict=quantized.state_dict())


def test_without_the_plugin(folder):
    """Plain Transformers stops at the empty weights instead of filling the layers at random."""
    code = f"""
import transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})
except (RuntimeError, ValueError) as error:
    print("refused:", type(error).__name__)
"""
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "refused: RuntimeError" in result.stdout, result.stderr[-2000:]


@pytest.mark.parametrize(
    ("kind", "gone"),
    [
        ("hrm_text", "model.H_module.layers.1.mlp.up_proj"),  # not in the first list of blocks
        ("zamba2", "model.layers.1.shared_transformer.self_attn.q_proj"),  # another block has it from here
    ],
)
def test_missing_layer_of_an_unusual_model(kind, gone, tmp_path):
    model = next(one for one in ARCHITECTURES if one.kind == kind).build()
    quantize_model(model, METHODS["SpQR"](), progress=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{gone}.")}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    fails(tmp_path, f"lacks {gone}.weight")
