"""LoRA on packed layers: train, save, load, merge."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

import peft
from peft import (
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    initialize_lora_eva_weights,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import dispatch_default
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import hf_spqr
from hf_spqr.integrations.peft import LoraPackedLinear, install
from hf_spqr.nn import AffineLinear, SpQRLinear
from tests.architectures.matrix import METHODS
from tests.integrations.conftest import IDS, quantize_folder
from tests.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(params=["hf_spqr", "omniquant"])
def folder(request, model_dir, texts, tmp_path):
    out = tmp_path / "quantized"
    if request.param == "hf_spqr":
        quantize_folder(model_dir(), texts).save_pretrained(out)
    else:
        config = hf_spqr.OmniQuantConfig(
            bits=4, group_size=32, rounding=False, epochs=0, dataset=texts, nsamples=4, seqlen=32
        )
        AutoModelForCausalLM.from_pretrained(model_dir(), quantization_config=config).save_pretrained(out)
    return out


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def adapted(folder, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    )


def train(model, steps=12):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.filterwarnings("error:Unsupported layer type")
def test_train_save_load_merge(folder, tmp_path):
    model = adapted(folder)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoraPackedLinear) and isinstance(layer.base_layer, SpQRLinear | AffineLinear)
    packed = layer.base_layer.packed.clone()
    start = logits(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    losses = train(model)
    assert losses[-1] < 0.95 * losses[0] and losses == sorted(losses, reverse=True), losses
    assert torch.equal(layer.base_layer.packed, packed)
    trained = logits(model)
    assert (trained - start).abs().max() > 0.1

    model.save_pretrained(tmp_path / "adapter")
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors")) < 60_000
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), trained)
    with again.disable_adapter():
        assert torch.equal(logits(again), start)

    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    merged = PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=1e-3, atol=1e-3)


def test_merging_into_a_packed_model_and_back(folder, tmp_path):
    model = adapted(folder)
    train(model, 3)
    trained = logits(model)
    model.merge_adapter()
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    assert isinstance(layer.base_layer, nn.Linear)
    torch.testing.assert_close(logits(model), trained, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    merged = model.merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.down_proj, nn.Linear)
    assert isinstance(merged.model.layers[0].mlp.up_proj, SpQRLinear | AffineLinear)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_merging_into_conv1d_and_biases(tmp_path):
    """GPT-2: transposed weights, one of them square, and biases, which a merge must not change in the packed layer."""
    base = tiny_model("gpt2")
    hf_spqr.quantize_model(base, METHODS["SpQR"](), progress=False)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], lora_bias=True, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    trained = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), trained, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again.transformer.h[0].attn.c_proj, Conv1D)
    torch.testing.assert_close(logits(again), trained, rtol=1e-3, atol=1e-3)


def test_the_trainer_takes_it(folder, tmp_path):
    model = adapted(folder)
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_classifier_with_a_new_head(folder, tmp_path):
    """The head is trained and saved with the adapters; ``Trainer`` trains, evaluates and predicts."""
    load = AutoModelForSequenceClassification.from_pretrained
    data = [{"input_ids": IDS[0], "labels": label} for label in (0, 2, 0, 2)]
    base = load(folder, num_labels=3)
    base.config.pad_token_id = 0
    config = LoraConfig(r=4, target_modules=TARGETS, task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(base, config)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(".score." in name for name in start) == 1
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert not any(torch.equal(p, start[name]) for name, p in model.named_parameters() if name in start)
    predicted = trainer.predict(data).predictions
    assert predicted.shape == (4, 3) and trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(tmp_path / "adapter")
    other = load(folder, num_labels=3)
    other.config.pad_token_id = 0
    again = PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits[0], torch.from_numpy(predicted[0]), rtol=1e-5, atol=1e-6)


def test_all_linear_layers(folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules="all-linear"))
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraPackedLinear)}
    assert len(adapted) == 14
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    assert adapted == {name for name, module in model.named_modules() if isinstance(module, LoraPackedLinear)}
    assert "other" in model.base_model.model.model.layers[1].mlp.down_proj.lora_A


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"], ["experts"]])
def test_adapters_on_packed_experts_are_refused(targets):
    model = tiny_model("qwen3_moe")
    hf_spqr.quantize_model(model, METHODS["SpQR"](), progress=False)
    with pytest.raises(hf_spqr.UnsupportedLayerError, match="packed experts take no adapters"):
        get_peft_model(model, LoraConfig(target_modules=targets))


def test_adapters_beside_offloaded_layers_are_refused(folder, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    base = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    with pytest.raises(hf_spqr.UnsupportedLayerError, match="load without offload"):
        get_peft_model(base, LoraConfig(target_modules=TARGETS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_what_packed_layers_cannot_do_is_refused(folder, options, message):
    """For the first adapter and for one more, which PEFT puts into the layers that are there."""
    with pytest.raises(hf_spqr.UnsupportedLayerError, match=message):
        adapted(folder, **options)
    model = adapted(folder)
    with pytest.raises(hf_spqr.UnsupportedLayerError, match=message):
        model.add_adapter("more", LoraConfig(r=4, target_modules=TARGETS, **options))


def test_kasa_is_refused(folder):
    pytest.importorskip("peft", minversion="0.21")
    with pytest.raises(hf_spqr.UnsupportedLayerError, match="KaSA"):
        adapted(folder, kasa_config=peft.KasaConfig())


@pytest.mark.parametrize("how", ["gaussian", "orthogonal", "eva"])
def test_initializations_that_leave_the_base_weights_alone(folder, how):
    start = logits(AutoModelForCausalLM.from_pretrained(folder))
    model = adapted(folder, init_lora_weights=how)
    if how == "eva":  # directions of the activations
        initialize_lora_eva_weights(model, [{"input_ids": IDS, "labels": IDS}] * 2)
    torch.testing.assert_close(logits(model), start, rtol=1e-4, atol=1e-4)
    losses = train(model, 6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (LoraConfig, {"r": 4, "target_modules": TARGETS, "use_rslora": True}),
        (PromptTuningConfig, {"num_virtual_tokens": 4}),
        (PrefixTuningConfig, {"num_virtual_tokens": 4}),
        (PromptEncoderConfig, {"num_virtual_tokens": 4, "encoder_hidden_size": 32}),
        (LNTuningConfig, {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    ],
)
def test_what_else_can_be_trained(folder, kind, fields):
    torch.manual_seed(0)
    config = kind(task_type="CAUSAL_LM", **fields)
    losses = train(get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config))
    assert losses[-1] < losses[0]


def test_several_adapters_in_a_batch(folder):
    model = adapted(folder)
    model.add_adapter("other", LoraConfig(r=8, target_modules=TARGETS))
    alone = {"__base__": logits(AutoModelForCausalLM.from_pretrained(folder))}
    for name in ("default", "other"):
        model.set_adapter(name)
        train(model, 3)
    model.eval()
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
    assert not torch.allclose(alone["default"], alone["other"], atol=1e-2)
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        mixed = model(IDS[:1].expand(3, -1), adapter_names=names).logits
    for row, name in zip(mixed, names, strict=True):
        torch.testing.assert_close(row, alone[name][0], rtol=1e-3, atol=1e-3)


def test_gradients_do_not_depend_on_checkpointing(folder):
    def gradients(model):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
        model.train()
        model(IDS, labels=IDS).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    plain = gradients(AutoModelForCausalLM.from_pretrained(folder))
    model = prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(folder))
    assert not model.model.gradient_checkpointing  # it is turned on for the quantizers that PEFT knows
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    for one, other in zip(gradients(model), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_older_version_is_named(folder, monkeypatch):
    """It makes its layers in another way; a TypeError would be all that the user sees."""
    monkeypatch.setattr(peft, "__version__", "0.18.1")
    monkeypatch.setattr(lora_model, "dispatch_default", dispatch_default)
    install()
    with pytest.raises(hf_spqr.UnsupportedLayerError, match=r"need PEFT 0.20 or newer, this is 0.18.1"):
        adapted(folder)
    dense = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=TARGETS))
    assert dense.active_adapter == "default"


def test_hf_spqr_does_not_import_peft_and_finds_it_later():
    code = (
        "import sys, hf_spqr.integrations\n"
        "assert 'peft' not in sys.modules\n"
        "import peft\n"
        "from peft.tuners.lora import model\n"
        "assert model.dispatch_default.knows_packed_layers\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
