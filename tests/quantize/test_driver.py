"""The whole-model run on tiny random models of many architectures."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import hf_spqr
from hf_spqr import CalibrationError, ConfigError, NonFiniteError, OmniQuantConfig, SpQRConfig, UnsupportedLayerError
from hf_spqr.nn import SpQRLinear
from hf_spqr.quantize import quantize_model
from hf_spqr.quantize.driver import least_bytes
from tests.tiny_models import ARCHITECTURES, tiny_model

IDS = torch.arange(40)[None]


def make_config(texts, **changes):
    return SpQRConfig(**{"bits": 4, "dataset": texts, "nsamples": 8, "seqlen": 64, **changes})


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(kind, texts, tokenizer):
    model = tiny_model(kind)
    before = logits(model)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    report = quantize_model(model, make_config(texts), tokenizer=tokenizer, progress=False)
    packed = {n for n, m in model.named_modules() if isinstance(m, SpQRLinear)}
    left = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert packed == linears - left and all("layers" in n or ".h." in n for n in packed)
    assert [layer.name for layer in report.layers] == [n for n, m in model.named_modules() if n in packed]
    assert set(report.skipped) == left
    assert all(0 < layer.error < 0.2 for layer in report.layers)
    assert report.nbytes == sum(m.nbytes() for m in model.modules() if isinstance(m, SpQRLinear))
    assert 4.6 < report.bits_per_weight < 8
    assert model.quantization_report is report
    assert 0 < distance(logits(model), before) < 0.35


@pytest.mark.parametrize("kind", ["llama", "falcon", "gpt2", "mixtral"])
@pytest.mark.parametrize("make", [SpQRConfig, OmniQuantConfig])
def test_least_bytes_are_those_of_the_files_without_outliers(kind, make, texts, tokenizer, tmp_path):
    """Known from an empty model: Linear, a subclass of it, Conv1D, experts; embeddings that are tied count once."""
    fast = {"outlier_threshold": math.inf} if make is SpQRConfig else {"epochs": 0}
    config = make(dataset=texts, nsamples=8, seqlen=64, modules_to_not_convert=["layers.1"], **fast)
    model = tiny_model(kind, torch.bfloat16, tie_word_embeddings=True)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    expected = least_bytes(empty, config)
    hf_spqr.quantize_model(model, config, tokenizer=tokenizer, progress=False)
    model.save_pretrained(tmp_path)
    assert expected == sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())


def test_least_bytes_with_a_target_and_without_work():
    model = tiny_model("llama", torch.bfloat16)
    weights = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n)
    least = {bits: least_bytes(model, SpQRConfig(3, 16, target_bits=bits)) for bits in (3.1, 8, 12)}
    assert least[12] - least[8] == weights // 2
    assert least[3.1] == least_bytes(model, SpQRConfig()) < least[8]  # what cannot be reached is refused later
    with pytest.raises(UnsupportedLayerError, match="Nothing to quantize"):
        least_bytes(model, SpQRConfig(modules_to_not_convert=["layers"]))


def test_a_packed_model_is_not_quantized_again(texts, tokenizer):
    """Also where a layer was left that could be."""
    model = tiny_model("llama", torch.bfloat16)
    config = make_config(texts, modules_to_not_convert=["layers.0"])
    quantize_model(model, config, tokenizer=tokenizer, progress=False)
    with pytest.raises(UnsupportedLayerError, match=r"already \(model\.layers\.1\.self_attn\.q_proj is"):
        quantize_model(model, make_config(texts), tokenizer=tokenizer, progress=False)


def test_more_bits_than_bfloat16_are_reported(texts, tokenizer, caplog):
    config = make_config(texts, overrides={"layers.1.mlp.down_proj": {"outlier_threshold": 1e-9}})
    model = tiny_model("llama", torch.bfloat16)
    report = quantize_model(model, config, tokenizer=tokenizer, progress=False)
    large = [layer.name for layer in report.layers if layer.bits_per_weight > 16]
    assert large == ["model.layers.1.mlp.down_proj"]
    (note,) = (note for note in report.notes if "more than the 16 of bfloat16" in note)
    assert note.startswith(large[0]) and "% of its weights are outliers. Raise outlier_threshold" in note
    assert caplog.messages == [note]


@pytest.mark.parametrize("threshold", ["inf", 0.2])
def test_narrow_layers_of_more_bits_have_no_outliers_to_blame(threshold, texts, tokenizer):
    model = tiny_model("llama", hidden_size=16, intermediate_size=64)
    config = make_config(texts, bits=8, outlier_threshold=threshold)
    report = quantize_model(model, config, tokenizer=tokenizer, progress=False)
    notes = [note for note in report.notes if "more than the 16 of bfloat16" in note]
    assert len(notes) == sum(layer.bits_per_weight > 16 for layer in report.layers) > 0
    assert all(note.endswith("for it is narrow. modules_to_not_convert leaves it as it is.") for note in notes)


def test_a_threshold_that_makes_layers_larger_stops_the_run_at_the_first_block(texts, tokenizer):
    model = tiny_model("llama", torch.bfloat16)
    with pytest.raises(ConfigError, match=r"1e-09 makes the layers of model.layers.0 larger .* of 16\."):
        quantize_model(model, make_config(texts, outlier_threshold=1e-9), tokenizer=tokenizer, progress=False)
    assert not any(isinstance(module, SpQRLinear) for module in model.modules())


def test_packed_model_equals_what_was_simulated(texts, tokenizer):
    """Layers after the first block were calibrated on the dequantized weights of the packed ones."""
    model = tiny_model("llama")
    quantize_model(model, make_config(texts), tokenizer=tokenizer, progress=False)
    dense = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, SpQRLinear):
            dense.set_submodule(name, module.to_linear())
    assert distance(logits(model), logits(dense)) < 1e-3


def test_sequential_inside_the_block(texts, tokenizer):
    together, one_by_one = tiny_model("llama"), tiny_model("llama")
    quantize_model(together, make_config(texts), tokenizer=tokenizer, progress=False)
    quantize_model(one_by_one, make_config(texts, true_sequential=True), tokenizer=tokenizer, progress=False)
    name = "model.layers.0.self_attn.q_proj"  # the first input of the model is the same either way
    assert torch.equal(together.get_submodule(name).packed, one_by_one.get_submodule(name).packed)
    name = "model.layers.0.mlp.down_proj"
    assert not torch.equal(together.get_submodule(name).packed, one_by_one.get_submodule(name).packed)
    assert distance(logits(one_by_one), logits(tiny_model("llama"))) < 0.35


def test_layers_that_share_an_input_share_a_hessian(texts, tokenizer, monkeypatch):
    from hf_spqr.quantize import capture

    made = []

    class Counting(capture.HessianAccumulator):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(capture, "HessianAccumulator", Counting)
    quantize_model(tiny_model("llama"), make_config(texts), tokenizer=tokenizer, progress=False)
    assert len(made) == 2 * 4  # q/k/v, o, gate/up, down in each block
    assert {h.tokens for h in made} == {8 * 64}


def test_exclusions_and_overrides(texts, tokenizer):
    model = tiny_model("llama")
    config = make_config(
        texts, modules_to_not_convert=["layers.0.mlp", r"o_proj$"], overrides={"k_proj": {"bits": 8, "group_size": -1}}
    )
    report = quantize_model(model, config, tokenizer=tokenizer, progress=False)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(model.model.layers[1].self_attn.o_proj) is nn.Linear
    assert "model.layers.0.mlp.up_proj" in report.skipped and "lm_head" in report.skipped
    layout = model.model.layers[1].self_attn.k_proj.layout
    assert (layout.bits, layout.group_size) == (8, -1)
    assert report.layer("model.layers.1.self_attn.k_proj").bits == 8


def test_dtype_bias_and_backend_are_kept(texts, tokenizer):
    model = tiny_model("qwen2", torch.bfloat16)
    bias = model.model.layers[0].self_attn.q_proj.bias.clone()
    quantize_model(model, make_config(texts, backend="reference"), tokenizer=tokenizer, progress=False)
    layer = model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.bias, bias) and layer.weight.dtype == torch.bfloat16 and layer.backend == "reference"
    assert model(IDS).logits.dtype == torch.bfloat16


def test_token_ids_need_no_tokenizer():
    ids = torch.randint(0, 256, (4, 32))
    report = quantize_model(tiny_model("llama"), make_config(ids, seqlen=32), progress=False)
    assert (report.calibration.samples, report.calibration.tokens) == (4, 128)


def test_long_windows_are_limited_to_the_positions_of_the_model(texts, tokenizer):
    report = quantize_model(
        tiny_model("llama"), make_config(texts * 8, seqlen=2048), tokenizer=tokenizer, progress=False
    )
    assert report.calibration.tokens <= 8 * 256


def test_report_round_trip(texts, tokenizer, tmp_path):
    from hf_spqr.report import QuantizationReport

    report = quantize_model(tiny_model("llama"), make_config(texts), tokenizer=tokenizer, progress=False)
    report.save(tmp_path)
    assert QuantizationReport.load(tmp_path).to_dict() == report.to_dict()
    assert report.calibration.description == "list of 8 items"
    assert "dataset" not in report.config


# -- errors before work is lost


def test_nan_weights_are_named(texts, tokenizer):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight contains NaN"):
        quantize_model(model, make_config(texts), tokenizer=tokenizer, progress=False)
    assert not any(isinstance(m, SpQRLinear) for m in model.modules())


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_nan_outside_of_the_blocks(name, texts, tokenizer):
    model = tiny_model("llama")
    model.get_parameter(name).data[-1] = torch.nan
    with pytest.raises(NonFiniteError, match=f"^{name} contains NaN"):
        quantize_model(model, make_config(texts), tokenizer=tokenizer, progress=False)


def test_nan_in_what_is_excluded_is_allowed(texts, tokenizer):
    model = tiny_model("llama")
    model.lm_head.weight.data[-1] = torch.nan
    quantize_model(model, make_config(texts, modules_to_not_convert=["lm_head"]), tokenizer=tokenizer, progress=False)


def test_token_ids_of_another_model():
    for ids in (torch.full((4, 32), 258), torch.full((4, 32), -1)):
        with pytest.raises(CalibrationError, match=r"the model has 258 embeddings"):
            quantize_model(tiny_model("llama"), make_config(ids, seqlen=32), progress=False)


def test_infinite_activations_are_named(texts, tokenizer):
    model = tiny_model("llama")
    model.model.layers[0].post_attention_layernorm.weight.data.fill_(1e38)
    with pytest.raises(NonFiniteError, match=r"^model\.layers\.0: mlp\.gate_proj: "):
        quantize_model(model, make_config(texts), tokenizer=tokenizer, progress=False)


def test_no_data(tokenizer):
    with pytest.raises(CalibrationError, match="dataset="):
        quantize_model(tiny_model("llama"), SpQRConfig(), tokenizer=tokenizer, progress=False)
    with pytest.raises(CalibrationError, match="tokenizer="):
        quantize_model(tiny_model("llama"), SpQRConfig(dataset=["text"]), progress=False)


def test_a_branch_that_no_token_takes(texts, tokenizer):
    """Experts that are layers of their own may see no token at all; they are quantized without data."""

    class Branches(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.taken, self.never = linear, copy.deepcopy(linear)

        def forward(self, x):
            return self.taken(x)

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = Branches(layer.mlp.up_proj)
    report = quantize_model(model, make_config(texts), tokenizer=tokenizer, progress=False)
    assert isinstance(model.model.layers[0].mlp.up_proj.never, SpQRLinear)
    assert any("layers.1.mlp.up_proj.never: no calibration token" in note for note in report.notes)
    assert report.layer("model.layers.0.mlp.up_proj.never").error < 0.2


def test_nothing_to_quantize(texts, tokenizer):
    with pytest.raises(UnsupportedLayerError, match="modules_to_not_convert"):
        config = make_config(texts, modules_to_not_convert=[".*"])
        quantize_model(tiny_model("llama"), config, tokenizer=tokenizer, progress=False)


def test_model_without_data(texts, tokenizer):
    with pytest.raises(UnsupportedLayerError, match="meta device"):
        quantize_model(tiny_model("llama").to("meta"), make_config(texts), tokenizer=tokenizer, progress=False)


@pytest.mark.parametrize("wrong", [None, {"bits": 3}, "hf_spqr"])
def test_a_config_is_one_of_ours(wrong):
    with pytest.raises(ConfigError, match="pass an SpQRConfig or an OmniQuantConfig"):
        quantize_model(tiny_model("llama"), wrong, progress=False)


@pytest.mark.parametrize("wrong", [7, "no-such-tokenizer"])
def test_a_tokenizer_that_is_none(wrong, texts):
    with pytest.raises(CalibrationError, match=f"tokenizer={wrong!r} is no tokenizer"):
        quantize_model(tiny_model("llama"), make_config(texts), tokenizer=wrong, progress=False)


@pytest.mark.parametrize("kind", [SpQRConfig, OmniQuantConfig])
def test_overrides_that_select_nothing_are_noted(kind, texts, tokenizer, caplog):
    overrides = {"dwn_proj": {"bits": 4}, "experts": {"bits": 4}, "q_proj": {"bits": 4}}
    config = kind(group_size=16, dataset=texts, nsamples=2, seqlen=32, overrides=overrides)
    report = quantize_model(tiny_model("llama"), config, tokenizer=tokenizer, progress=False)
    noted = [note for note in report.notes if note.startswith("overrides")]
    assert noted == [f"overrides: {name!r} selects no layer that is quantized." for name in ("dwn_proj", "experts")]
    assert all(note in caplog.text for note in noted)  # while the work can still be stopped


def test_exclusions_that_select_nothing_are_noted(texts, tokenizer):
    patterns = ["lm_head", "experts.gate_proj", "layers.7", "gate$"]
    config = make_config(texts, modules_to_not_convert=patterns)
    report = quantize_model(tiny_model("mixtral"), config, tokenizer=tokenizer, progress=False)
    noted = [note for note in report.notes if note.startswith("modules_to_not_convert")]
    assert noted == ["modules_to_not_convert: 'layers.7' selects no module."]


def test_progress_names_layer_error_and_bits(texts, tokenizer, capsys):
    quantize_model(tiny_model("llama"), make_config(texts), tokenizer=tokenizer)
    shown = capsys.readouterr().err
    assert "14/14" in shown and "down_proj error 0." in shown and "bits" in shown


def test_replaced_weights_are_freed(texts, tokenizer):
    """The run remembers the original layers, but not their weights."""
    model = tiny_model("qwen2")
    originals = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    quantize_model(model, make_config(texts), tokenizer=tokenizer, progress=False)
    assert {layer.weight.numel() for layer in originals} == {0}
    assert model(IDS).logits.isfinite().all()
