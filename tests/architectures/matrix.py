"""Every architecture of the table in docs/status.md, and what is checked on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_spqr import OmniQuantConfig, SpQRConfig
from hf_spqr.config import PackedConfig
from hf_spqr.integrations.transformers import quantize_model
from tests.tiny_models import COMMON, tiny_model

TEXT = {key: COMMON[key] for key in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 16}  # fmt: skip
BART = {
    "vocab_size": 258, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 256, "eos_token_id": 257, "decoder_start_token_id": 257,
    "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"vocab_size": 258, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 257}  # fmt: skip
IDS = torch.arange(3, 23)[None]


@dataclass(frozen=True)
class Architecture:
    """A tiny random model: ``model_type``, changes of its config, and the class where it is no causal decoder."""

    kind: str
    group: str
    changes: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    slow: bool = False

    def build(self) -> PreTrainedModel:
        if self.model is None:
            return tiny_model(self.kind, **self.changes)
        config = transformers.AutoConfig.for_model(self.kind, **self.changes)
        torch.manual_seed(0)
        return getattr(transformers, self.model)(config).eval()


def vision_language(kind: str, model: str, text: str, vision: dict[str, Any], **more: Any) -> Architecture:
    special = {"gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
               "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                     "mrope_section": [2, 3, 3]}}}  # fmt: skip
    changes = {"text_config": {"model_type": text, **TEXT, **special.get(text, {})}, "vision_config": vision, **more}
    return Architecture(kind, "vision and language", changes, model)


LINEAR_ATTENTION = {"layer_types": ["linear_attention", "full_attention"]}
DENSE = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo2 granite cohere2 starcoder2 stablelm nemotron"
)
MORE = "olmo olmo3 cohere smollm3 exaone4 glm4"
CLASSIC = "opt bloom gpt_neox gptj falcon mpt"
CONV1D = "gpt2"
MOE = "mixtral qwen3_moe olmoe deepseek_v3 gpt_oss llama4_text"
MORE_MOE = (
    "qwen2_moe phimoe granitemoe minimax glm4_moe ernie4_5_moe hunyuan_v1_moe dots1 aria_text flex_olmo minimax_m2 "
    "deepseek_v4 hy_v4"
)
QWEN2_VL = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}

ARCHITECTURES: list[Architecture] = [
    *[Architecture(kind, "decoder") for kind in DENSE.split()],
    *[Architecture(kind, "decoder", slow=True) for kind in MORE.split()],
    *[Architecture(kind, "older decoder") for kind in CLASSIC.split()],
    *[Architecture(kind, "older decoder", slow=True) for kind in ("codegen", "gpt_neo", "gpt_bigcode")],
    *[Architecture(kind, "Conv1D layers") for kind in CONV1D.split()],
    *[Architecture(kind, "mixture of experts") for kind in MOE.split()],
    *[Architecture(kind, "mixture of experts", slow=True) for kind in MORE_MOE.split()],
    Architecture("lfm2", "convolution or recurrence"),
    Architecture("mamba", "convolution or recurrence", slow=True),
    Architecture(
        "qwen3_next",
        "convolution or recurrence",
        {
            **LINEAR_ATTENTION,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        slow=True,
    ),
    vision_language(
        "llava",
        "LlavaForConditionalGeneration",
        "llama",
        {"model_type": "clip_vision_model", **VISION},
        image_token_index=255,
    ),
    vision_language(
        "gemma3", "Gemma3ForConditionalGeneration", "gemma3_text", SIGLIP, mm_tokens_per_image=4, image_token_index=255
    ),
    vision_language("qwen2_vl", "Qwen2VLForConditionalGeneration", "qwen2_vl_text", QWEN2_VL, image_token_id=255),
    vision_language(
        "idefics3", "Idefics3ForConditionalGeneration", "llama", VISION, image_token_id=255, scale_factor=2
    ),
    Architecture("t5", "encoder and decoder", {**T5, "feed_forward_proj": "gated-gelu"}, "T5ForConditionalGeneration"),
    Architecture("mt5", "encoder and decoder", T5, "MT5ForConditionalGeneration", slow=True),
    Architecture("bart", "encoder and decoder", BART, "BartForConditionalGeneration"),
]


def spqr_config() -> SpQRConfig:
    return SpQRConfig(bits=4, dataset=calibration_ids(), nsamples=2, seqlen=32)


def omniquant_config() -> OmniQuantConfig:
    return OmniQuantConfig(bits=4, group_size=16, epochs=1, dataset=calibration_ids(), nsamples=2, seqlen=32)


METHODS: dict[str, Callable[[], PackedConfig]] = {"SpQR": spqr_config, "OmniQuant": omniquant_config}


def calibration_ids() -> Tensor:
    return torch.randint(1, 250, (2, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def assert_same(a: PreTrainedModel, b: PreTrainedModel) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert torch.equal(logits(a), logits(b))


def assert_same_classes(dequantized: PreTrainedModel, original: PreTrainedModel) -> None:
    """The modules of a model that was never quantized; ``nn.Linear`` stands for its subclasses (Falcon has one)."""
    modules = dict(original.named_modules())
    assert modules.keys() == dict(dequantized.named_modules()).keys()
    assert all(isinstance(modules[name], type(module)) for name, module in dequantized.named_modules())


@dataclass
class Outcome:
    """What happened: packed layers, linear layers left alone, relative change of the logits."""

    packed: int
    skipped: int
    change: float


def check(architecture: Architecture, method: str, folder: Path) -> Outcome:
    """Quantize, save, reload to the bit, generate, dequantize, save and reload without the package's modules.

    Raises AssertionError, or whatever fails.
    """
    model = architecture.build()
    load = type(model).from_pretrained
    before = logits(model)
    report = quantize_model(model, METHODS[method](), progress=False)
    quantized = logits(model)
    change = distance(quantized, before)
    assert report.layers and 0 < change < 0.6
    model.save_pretrained(folder / "quantized")
    loaded = load(folder / "quantized")
    assert_same(loaded, model)
    tokens = loaded.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] == (4 if model.config.is_encoder_decoder else IDS.shape[1] + 3)
    loaded.dequantize()
    assert_same_classes(loaded, architecture.build())
    assert distance(logits(loaded), quantized) < 1e-3
    loaded.save_pretrained(folder / "dequantized")
    assert_same(load(folder / "dequantized"), loaded)
    return Outcome(len(report.layers), len(report.skipped), change)
