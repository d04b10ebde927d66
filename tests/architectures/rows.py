"""The rows of the table in docs/status.md: what a tiny random model of every architecture is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

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


@dataclass(frozen=True)
class Architecture:
    """A tiny random model: ``model_type``, changes of its config, and the class where it is no causal decoder.

    chain: its blocks are one, as OmniQuant needs them.
    """

    kind: str
    group: str
    changes: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    slow: bool = False
    chain: bool = True

    def build(self) -> PreTrainedModel:
        if self.model is None:
            return tiny_model(self.kind, **self.changes)
        config = transformers.AutoConfig.for_model(self.kind, **self.changes)
        torch.manual_seed(0)
        return getattr(transformers, self.model)(config).eval()


SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR_ATTENTION = {"layer_types": ["linear_attention", "full_attention"]}
DELTA_NET = {**LINEAR_ATTENTION, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
             "linear_value_head_dim": 16}  # fmt: skip
EXPERTS = {key: COMMON[key] for key in (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
)}  # fmt: skip
LATENT = {"head_dim": 8, "num_key_value_heads": 4}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2,
          "mamba_chunk_size": 16}  # fmt: skip
GEMMA4 = {**TEXT, **SLIDING, "num_hidden_layers": 4, "layer_types": SLIDING["layer_types"] * 2,
          "num_kv_shared_layers": 2, "global_head_dim": 16, "hidden_size_per_layer_input": 32,
          "vocab_size_per_layer_input": 258, "initializer_range": 0.2}  # fmt: skip
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
OF_TEXT: dict[str, dict[str, Any]] = {
    "gemma3_text": SLIDING,
    "gemma4_text": GEMMA4,
    "llama4_text": {**EXPERTS, "num_experts_per_tok": 1, "num_local_experts": 4, "interleave_moe_layer_step": 1,
                    "intermediate_size_mlp": 96, "attention_chunk_size": 16},
    "qwen2_vl_text": SECTIONS,
    "qwen2_5_vl_text": SECTIONS,
    "qwen3_vl_text": SECTIONS,
    "qwen3_vl_moe_text": {**SECTIONS, **EXPERTS},
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": {**DELTA_NET, **EXPERTS},
}  # fmt: skip


def vision_language(
    kind: str, model: str, text: str, vision: dict[str, Any], slow: bool = False, **more: Any
) -> Architecture:
    changes = {"text_config": {"model_type": text, **TEXT, **OF_TEXT.get(text, {})}, "vision_config": vision, **more}
    return Architecture(kind, "vision and language", changes, model, slow)


DENSE = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo2 granite cohere2 starcoder2 stablelm nemotron"
)
MORE = "olmo olmo3 cohere smollm3 exaone4 glm4 seed_oss ernie4_5 arcee apertus ministral3 helium hunyuan_v1_dense"
CLASSIC = "opt bloom gpt_neox gptj falcon mpt"
CONV1D = "gpt2"
MOE = "mixtral qwen3_moe olmoe deepseek_v3 gpt_oss llama4_text"
MORE_MOE = (
    "qwen2_moe phimoe granitemoe minimax glm4_moe ernie4_5_moe hunyuan_v1_moe dots1 aria_text flex_olmo minimax_m2 "
    "deepseek_v4 hy_v4"
)
MIXTURE, HYBRID = "mixture of experts", "convolution or recurrence"
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
               "num_position_embeddings": 64}  # fmt: skip
QWEN2_VL = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
CLIP = {"model_type": "clip_vision_model", **VISION}
VIDEO = {"image_token_id": 255, "video_token_id": 254}
PHI4_AUDIO = {"hidden_size": 32, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 2,
              "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
              "input_size": 16, "audio_token_id": 254}  # fmt: skip
BERT = {key: TEXT[key] for key in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "pad_token_id",
)}  # fmt: skip
ENCODERS = {
    "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM", "deberta": "DebertaForMaskedLM",
    "deberta-v2": "DebertaV2ForMaskedLM", "modernbert": "ModernBertForMaskedLM", "eurobert": "EuroBertForMaskedLM",
}  # fmt: skip
OF_ENCODER: dict[str, dict[str, Any]] = {
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
}

ARCHITECTURES: list[Architecture] = [
    *[Architecture(kind, "decoder") for kind in DENSE.split()],
    Architecture("gemma4_text", "decoder", GEMMA4, "Gemma4ForCausalLM"),
    Architecture("gemma3n_text", "decoder", {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": SLIDING["layer_types"] * 2,
        "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 258, "laurel_rank": 16, "sliding_window": 8,
    }, slow=True),
    *[Architecture(kind, "decoder", slow=True) for kind in MORE.split()],
    *[Architecture(kind, "older decoder") for kind in CLASSIC.split()],
    *[Architecture(kind, "older decoder", slow=True) for kind in ("codegen", "gpt_neo", "gpt_bigcode")],
    *[Architecture(kind, "Conv1D layers") for kind in CONV1D.split()],
    *[Architecture(kind, MIXTURE) for kind in MOE.split()],
    Architecture("longcat_flash", MIXTURE, {
        **LATENT, "num_layers": 2, "num_hidden_layers": 2, "zero_expert_num": 2, "expert_ffn_hidden_size": 48,
        "ffn_hidden_size": 96, "moe_topk": 2,
    }),
    *[Architecture(kind, MIXTURE, slow=True) for kind in MORE_MOE.split()],
    *[Architecture(kind, MIXTURE, LATENT, slow=True) for kind in ("deepseek_v2", "deepseek_v32", "glm4_moe_lite")],
    Architecture("lfm2", HYBRID),
    Architecture("lfm2_moe", HYBRID, {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, slow=True),
    Architecture("mamba", HYBRID, {"time_step_rank": 48}),
    Architecture("falcon_mamba", HYBRID, {"time_step_rank": 48}, slow=True),
    Architecture("mamba2", HYBRID, {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}, slow=True),
    Architecture("jamba", HYBRID, {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0,
        "mamba_dt_rank": 48, "num_experts": 20,
    }),
    Architecture("nemotron_h", HYBRID, {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16, "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 48,
    }, slow=True),
    Architecture("bamba", HYBRID, {**MAMBA2, "attn_layer_indices": [1]}, slow=True),
    Architecture("falcon_h1", HYBRID, {**MAMBA2, "mamba_d_ssm": 128}, slow=True),
    Architecture("granitemoehybrid", HYBRID, {**MAMBA2, **LINEAR_ATTENTION}, slow=True),
    Architecture("zamba2", HYBRID, {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "n_mamba_heads": 8,
        "mamba_d_state": 16, "chunk_size": 16, "adapter_rank": 16, "num_key_value_heads": 4,
    }),
    Architecture("recurrent_gemma", HYBRID, {
        "block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": 8,
    }, slow=True),
    Architecture("qwen3_next", HYBRID, DELTA_NET, slow=True),
    Architecture("qwen3_5_text", HYBRID, DELTA_NET),
    Architecture("qwen3_5_moe_text", HYBRID, DELTA_NET, slow=True),
    Architecture("olmo_hybrid", HYBRID, DELTA_NET, slow=True),
    Architecture("kimi_linear", HYBRID, {
        **LATENT, **LINEAR_ATTENTION, "linear_head_dim": 16, "linear_num_heads": 4, "q_lora_rank": None,
    }, slow=True),
    Architecture("hrm_text", "blocks in a loop", {}, chain=False),
    vision_language("llava", "LlavaForConditionalGeneration", "llama", CLIP, image_token_index=255),
    vision_language(
        "gemma3", "Gemma3ForConditionalGeneration", "gemma3_text", SIGLIP, mm_tokens_per_image=4, image_token_index=255
    ),
    vision_language(
        "gemma4", "Gemma4ForConditionalGeneration", "gemma4_text",
        {**VISION, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}, slow=True,
        **VIDEO, audio_token_id=253,
    ),
    vision_language("qwen2_vl", "Qwen2VLForConditionalGeneration", "qwen2_vl_text", QWEN2_VL, image_token_id=255),
    vision_language(
        "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text",
        {**QWEN_VISION, "fullatt_block_indexes": [1]}, slow=True, **VIDEO,
    ),
    vision_language(
        "qwen3_vl", "Qwen3VLForConditionalGeneration", "qwen3_vl_text",
        {**QWEN_VISION, "deepstack_visual_indexes": [0, 1]}, slow=True, **VIDEO,
    ),
    vision_language(
        "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe_text",
        {**QWEN_VISION, "deepstack_visual_indexes": [0, 1]}, slow=True, **VIDEO,
    ),
    vision_language("qwen3_5", "Qwen3_5ForConditionalGeneration", "qwen3_5_text", QWEN_VISION, slow=True, **VIDEO),
    vision_language(
        "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text", QWEN_VISION, slow=True, **VIDEO
    ),
    vision_language(
        "mistral3", "Mistral3ForConditionalGeneration", "ministral3", {"model_type": "pixtral", **VISION,
        "head_dim": 16}, slow=True, image_token_index=255, spatial_merge_size=1,
    ),
    vision_language(
        "llama4", "Llama4ForConditionalGeneration", "llama4_text",
        {**VISION, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}, slow=True,
        image_token_index=255, boi_token_index=253, eoi_token_index=254,
    ),
    vision_language(
        "internvl", "InternVLForConditionalGeneration", "qwen2",
        {**VISION, "image_size": [32, 32], "patch_size": [16, 16]}, slow=True, image_token_id=255,
    ),
    vision_language(
        "idefics3", "Idefics3ForConditionalGeneration", "llama", VISION, image_token_id=255, scale_factor=2
    ),
    Architecture("phi4_multimodal", "vision, audio and language", {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "audio_config": PHI4_AUDIO,
        "vision_config": {**VISION, "crop_size": 32, "image_token_id": 255},
    }, slow=True),
    Architecture("t5", "encoder and decoder", {**T5, "feed_forward_proj": "gated-gelu"}, "T5ForConditionalGeneration"),
    Architecture("mt5", "encoder and decoder", T5, "MT5ForConditionalGeneration", slow=True),
    Architecture("bart", "encoder and decoder", BART, "BartForConditionalGeneration"),
    Architecture("m2m_100", "encoder and decoder", BART, "M2M100ForConditionalGeneration", slow=True),
    Architecture("t5gemma", "encoder and decoder", {
        "encoder": {**TEXT, **SLIDING}, "decoder": {**TEXT, **SLIDING}, "vocab_size": 258,
    }, "T5GemmaForConditionalGeneration", slow=True),
    *[
        Architecture(kind, "encoder", {**BERT, **OF_ENCODER.get(kind, {})}, model, slow=kind != "bert")
        for kind, model in ENCODERS.items()
    ],
    Architecture("albert", "blocks in a loop", {**BERT, "embedding_size": 32}, "AlbertForMaskedLM", chain=False),
]  # fmt: skip
