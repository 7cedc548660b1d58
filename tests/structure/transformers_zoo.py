"""Tiny random models of many transformers architectures, and example inputs for them.

A row says which class to build and what its config needs beyond the common small sizes; nothing here tells secateur
anything about a model. Sizes are distinct on purpose (width 32, inner 72, vocabulary 99, length 7), so that dimensions
that are equal by accident do not hide mistakes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "d_model": 32, "n_embd": 32, "n_layer": 2,
    "n_head": 4, "n_positions": 64, "n_ctx": 64, "n_layers": 2, "n_heads": 4, "dim": 32, "hidden_dim": 72,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 72, "decoder_ffn_dim": 72, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 72,
    "ffn_dim": 72, "word_embed_proj_dim": 32, "embedding_size": 16, "emb_dim": 32, "n_inner": 72,
    "num_decoder_layers": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56,
    "attention_dropout": 0.0, "attention_heads": 4, "relative_attention_num_buckets": 8, "state_size": 8,
    "sliding_window": 4, "layer_types": None, "type_vocab_size": 2, "d_inner": 72, "max_seq_len": 64, "max_length": 20,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "num_channels": 3, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 72, "decoder_ffn_dim": 72,
}  # fmt: skip
AUDIO = {
    "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 33,
    "conv_dim": (24, 24, 20), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 3, "classifier_proj_size": 24,
    "apply_spec_augment": False, "mask_time_prob": 0.0,
}  # fmt: skip
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 40]}


@dataclass(frozen=True)
class Case:
    """One architecture: the model class, what its config needs, and which inputs its forward takes."""

    model: str
    inputs: str
    options: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None


PLAIN = {
    "text": (
        "LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM GemmaForCausalLM "
        "Gemma2ForCausalLM Gemma3ForCausalLM PhiForCausalLM Phi3ForCausalLM GPT2LMHeadModel "
        "GPTNeoXForCausalLM OPTForCausalLM BloomForCausalLM FalconForCausalLM StableLmForCausalLM "
        "OlmoForCausalLM Olmo2ForCausalLM CohereForCausalLM Cohere2ForCausalLM Starcoder2ForCausalLM "
        "GraniteForCausalLM GlmForCausalLM Glm4ForCausalLM SmolLM3ForCausalLM PersimmonForCausalLM "
        "NemotronForCausalLM HeliumForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM XGLMForCausalLM "
        "BioGptForCausalLM CTRLLMHeadModel OpenAIGPTLMHeadModel GPTBigCodeForCausalLM ArceeForCausalLM "
        "SeedOssForCausalLM ModernBertDecoderForCausalLM MixtralForCausalLM Qwen2MoeForCausalLM "
        "Qwen3MoeForCausalLM OlmoeForCausalLM GraniteMoeForCausalLM PhimoeForCausalLM GptOssForCausalLM "
        "DiffLlamaForCausalLM BitNetForCausalLM HunYuanDenseV1ForCausalLM BertForSequenceClassification "
        "RobertaForSequenceClassification DistilBertForSequenceClassification AlbertForSequenceClassification "
        "ElectraForSequenceClassification DebertaForSequenceClassification DebertaV2ForSequenceClassification "
        "XLMForSequenceClassification XLMRobertaForTokenClassification ErnieForSequenceClassification "
        "FunnelForSequenceClassification ModernBertForSequenceClassification CamembertForMaskedLM "
        "ConvBertForSequenceClassification MobileBertForSequenceClassification "
        "NystromformerForSequenceClassification RoFormerForSequenceClassification "
        "FNetForSequenceClassification RemBertForSequenceClassification LayoutLMForSequenceClassification "
        "MegatronBertForSequenceClassification IBertForSequenceClassification XLNetForSequenceClassification "
        "FlaubertForSequenceClassification BertForMaskedLM "
    ),
    "seq2seq": (
        "T5ForConditionalGeneration MT5ForConditionalGeneration UMT5ForConditionalGeneration "
        "BartForConditionalGeneration MBartForConditionalGeneration PegasusForConditionalGeneration "
        "MarianMTModel M2M100ForConditionalGeneration BlenderbotForConditionalGeneration "
        "BlenderbotSmallForConditionalGeneration PLBartForConditionalGeneration MvpForConditionalGeneration "
        "LongT5ForConditionalGeneration SwitchTransformersForConditionalGeneration "
        "PegasusXForConditionalGeneration "
    ),
    "image": (
        "ViTForImageClassification DeiTForImageClassification BeitForImageClassification "
        "Dinov2ForImageClassification ViTMSNForImageClassification IJepaForImageClassification "
        "Dinov2WithRegistersForImageClassification Data2VecVisionForImageClassification "
    ),
    "audio": (
        "Wav2Vec2ForCTC HubertForCTC WavLMForCTC UniSpeechForCTC UniSpeechSatForCTC Data2VecAudioForCTC "
        "Wav2Vec2ConformerForCTC "
    ),
    "pair": ("SiglipModel "),
    "vilt": ("ViltForQuestionAnswering "),
}
# (class, inputs, what its config needs beyond the common sizes)
SPECIAL: list[tuple[str, str, dict[str, Any]]] = [
    ("GPTNeoForCausalLM", "text", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    ("GPTJForCausalLM", "text", {"rotary_dim": 4}),
    ("CodeGenForCausalLM", "text", {"rotary_dim": 4}),
    ("MptForCausalLM", "text", {"expansion_ratio": 2}),
    ("DeepseekV2ForCausalLM", "text", {
        "kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
        "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 4,
        "num_key_value_heads": 4, "n_group": 1, "topk_group": 1}),
    ("DeepseekV3ForCausalLM", "text", {
        "kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
        "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "num_key_value_heads": 4, "head_dim": 4}),
    ("Lfm2ForCausalLM", "text", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 72}),
    ("MambaForCausalLM", "text", {"time_step_rank": 6}),
    ("Mamba2ForCausalLM", "text", {"head_dim": 16, "num_heads": 4, "n_groups": 2, "chunk_size": 4}),
    ("FalconMambaForCausalLM", "text", {"time_step_rank": 6}),
    ("RwkvForCausalLM", "text", {"attention_hidden_size": 32, "use_cache": False}),
    ("MPNetForSequenceClassification", "text", {"pad_token_id": 1, "relative_attention_num_buckets": 32}),
    ("SqueezeBertForSequenceClassification", "text", {"embedding_size": 32}),
    ("EsmForSequenceClassification", "text", {"position_embedding_type": "rotary"}),
    ("LongformerForSequenceClassification", "text", {"attention_window": 4}),
    ("BigBirdForSequenceClassification", "text", {"attention_type": "original_full"}),
    ("CLIPTextModelWithProjection", "text", {"projection_dim": 24}),
    ("LEDForConditionalGeneration", "seq2seq", {
        "attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}),
    ("ProphetNetForConditionalGeneration", "seq2seq", {
        "num_encoder_layers": 2, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
        "num_buckets": 8, "ngram": 2}),
    ("SwinForImageClassification", "image", {
        "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2}),
    ("Swinv2ForImageClassification", "image", {
        "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2}),
    ("ConvNextForImageClassification", "image", {**STAGES, "patch_size": 4}),
    ("ConvNextV2ForImageClassification", "image", {**STAGES, "patch_size": 4}),
    ("SegformerForSemanticSegmentation", "image", {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 20, "patch_sizes": [7, 3, 3, 3], "image": 64}),
    ("PvtForImageClassification", "image", {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
        "image_size": 64, "patch_sizes": [4, 2, 2, 2], "image": 64}),
    ("PvtV2ForImageClassification", "image", {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
        "image_size": 64, "image": 64}),
    ("PoolFormerForImageClassification", "image", {**STAGES, "image": 64}),
    ("ResNetForImageClassification", "image", {
        "embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 1, 1]}),
    ("RegNetForImageClassification", "image", {
        "embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 1, 1], "groups_width": 8}),
    ("MobileNetV1ForImageClassification", "image", {"depth_multiplier": 0.25}),
    ("MobileNetV2ForImageClassification", "image", {"depth_multiplier": 0.35}),
    ("MobileViTForImageClassification", "image", {
        "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 40], "patch_size": 2,
        "image_size": 64, "image": 64}),
    ("MobileViTV2ForImageClassification", "image", {
        "width_multiplier": 0.25, "patch_size": 2, "image_size": 64, "image": 64}),
    ("LevitForImageClassification", "image", {
        "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 3, 4], "depths": [2, 2, 2], "key_dim": [8, 8, 8],
        "image_size": 64, "image": 64, "patch_size": 16}),
    ("EfficientNetForImageClassification", "image", {
        "width_coefficient": 0.25, "depth_coefficient": 0.25, "image_size": 64, "image": 64, "hidden_dim": 320}),
    ("YolosForObjectDetection", "image", {"image_size": [32, 32], "num_detection_tokens": 5}),
    ("DPTForDepthEstimation", "image", {
        "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [12, 16, 20, 24],
        "fusion_hidden_size": 16, "is_hybrid": False, "reassemble_factors": [4, 2, 1, 0.5]}),
    ("GLPNForDepthEstimation", "image", {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 16, "image": 64}),
    ("CvtForImageClassification", "image", {
        "embed_dim": [16, 24, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "image": 64}),
    ("FocalNetForImageClassification", "image", {
        "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32], "focal_levels": [2, 2],
        "focal_windows": [3, 3], "patch_size": 4}),
    ("HieraForImageClassification", "image", {
        "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "image_size": [32, 32], "patch_size": [7, 7],
        "patch_stride": [4, 4], "masked_unit_size": [4, 4], "query_stride": [2, 2], "num_query_pool": 2}),
    ("BitForImageClassification", "image", {
        "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4}),
    ("SwiftFormerForImageClassification", "image", {
        "depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 40], "image_size": 64, "image": 64}),
    ("DetrForObjectDetection", "image", {"backbone_config": "resnet", "num_queries": 5, "image": 64}),
    ("DeformableDetrForObjectDetection", "image", {
        "backbone_config": "resnet4", "num_queries": 5, "image": 64, "num_feature_levels": 4}),
    ("ConditionalDetrForObjectDetection", "image", {"backbone_config": "resnet", "num_queries": 5, "image": 64}),
    ("UperNetForSemanticSegmentation", "image", {
        "backbone_config": "convnext", "hidden_size": 16, "auxiliary_channels": 12, "auxiliary_in_channels": 32,
        "image": 64}),
    ("CLIPVisionModelWithProjection", "image", {"projection_dim": 24}),
    ("VideoMAEForVideoClassification", "video", {"num_frames": 4}),
    ("TimesformerForVideoClassification", "video", {"num_frames": 4}),
    ("VivitForVideoClassification", "video", {"num_frames": 4, "tubelet_size": [2, 8, 8]}),
    ("SEWForCTC", "audio", {"squeeze_factor": 2}),
    ("SEWDForCTC", "audio", {"squeeze_factor": 2, "position_buckets": 8, "max_position_embeddings": 64}),
    ("WhisperForConditionalGeneration", "whisper", {
        "num_mel_bins": 12, "max_source_positions": 20, "max_target_positions": 30}),
    ("Speech2TextForConditionalGeneration", "speech", {
        "input_feat_per_channel": 12, "conv_channels": 20, "num_conv_layers": 2, "conv_kernel_sizes": [5, 5],
        "max_source_positions": 60, "max_target_positions": 30}),
    ("ASTForAudioClassification", "spectrogram", {
        "max_length": 24, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8}),
    ("Wav2Vec2BertForCTC", "features", {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 5}),
    ("CLIPModel", "pair", {"projection_dim": 24}),
    ("ChineseCLIPModel", "pair", {"projection_dim": 24}),
    ("BlipForImageTextRetrieval", "pair", {"projection_dim": 24, "image_text_hidden_size": 20}),
    ("PatchTSTForPrediction", "series", {
        "num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4, "prediction_length": 6,
        "ffn_dim": 72, "d_model": 32}),
    ("PatchTSMixerForPrediction", "series", {
        "num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4, "prediction_length": 6,
        "d_model": 16}),
]  # fmt: skip
EAGER = {  # the same under eager attention
    "LlamaForCausalLM": "text",
    "Qwen3ForCausalLM": "text",
    "GPT2LMHeadModel": "text",
    "BertForSequenceClassification": "text",
    "ViTForImageClassification": "image",
    "BartForConditionalGeneration": "seq2seq",
    "MixtralForCausalLM": "text",
}

CASES: dict[str, Case] = {
    **{name: Case(name, kind) for kind, names in PLAIN.items() for name in names.split()},
    **{name: Case(name, kind, options) for name, kind, options in SPECIAL},
    **{f"{name}:eager": Case(name, kind, {}, "eager") for name, kind in EAGER.items()},
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of a row with random weights, in eval mode, and an example for it."""
    import transformers

    case = CASES[name]
    cls = getattr(transformers, case.model)
    torch.manual_seed(seed)
    config = _config(cls.config_class, case)
    if case.attention:
        config._attn_implementation = case.attention
    model = cls(config).eval()
    _shake(model)
    return model, example(case)


def _shake(model: nn.Module) -> None:
    """Weights of order 1 / sqrt(fan in) and biases that differ: every path matters in the outputs, so none hides."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(min(10.0, parameter[0].numel() ** -0.5 / float(parameter.std())))


def _config(cls: Any, case: Case) -> Any:
    common = {"image": VISION, "video": VISION, "spectrogram": VISION, "audio": AUDIO}.get(case.inputs, TEXT)
    if case.inputs == "features":
        common = {**AUDIO, "num_conv_pos_embeddings": 16}
    if case.inputs == "pair":
        parts = {name: _sub(cls, name, common) for name, common in (("text_config", TEXT), ("vision_config", VISION))}
        return cls(**parts, **case.options)
    if case.inputs == "vilt":
        common = {**TEXT, **VISION}
    options = {**_known(cls, common), **{k: v for k, v in case.options.items() if k != "image"}}
    if "backbone_config" in options:
        options["backbone_config"] = _backbone(options["backbone_config"])
    return cls(**options)


def _sub(cls: Any, name: str, common: dict[str, Any]) -> dict[str, Any]:
    return _known(cls.sub_configs[name], {**common, "projection_dim": 24})


def _known(cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters
    return {key: value for key, value in options.items() if key in parameters and value is not None}


def _backbone(kind: str) -> Any:
    from transformers import ConvNextConfig, ResNetConfig

    if kind == "convnext":
        stages = ["stage1", "stage2", "stage3", "stage4"]
        return ConvNextConfig(**STAGES, patch_size=4, out_features=stages)
    out = ["stage2", "stage3", "stage4"] if kind == "resnet4" else ["stage4"]
    return ResNetConfig(embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], out_features=out)


def example(case: Case) -> dict[str, Tensor]:
    """Keyword arguments for the forward."""
    torch.manual_seed(1)
    ids = torch.randint(3, 99, (2, 7))
    size = case.options.get("image", 32)
    pixels = torch.randn(2, 3, size, size)
    return {
        "text": lambda: {"input_ids": ids},
        "seq2seq": lambda: {"input_ids": ids, "decoder_input_ids": ids[:, :5]},
        "image": lambda: {"pixel_values": pixels},
        "video": lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
        "audio": lambda: {"input_values": torch.randn(2, 400)},
        "whisper": lambda: {"input_features": torch.randn(2, 12, 40), "decoder_input_ids": ids[:, :5] % 30},
        "speech": lambda: {"input_features": torch.randn(2, 40, 12), "decoder_input_ids": ids[:, :5]},
        "spectrogram": lambda: {"input_values": torch.randn(2, 24, 16)},
        "features": lambda: {"input_features": torch.randn(2, 20, 16)},
        "pair": lambda: {"input_ids": ids, "pixel_values": pixels},
        "vilt": lambda: {"input_ids": ids, "pixel_values": pixels},
        "series": lambda: {"past_values": torch.randn(2, 32, 3)},
    }[case.inputs]()
