"""Torch modules that people bring, small and with random weights: of transformers, and plain ones.

Each comes with example inputs and the axes that may change, which is what `trace` is given; to
build one takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.plain_modules import PLAIN

WORDS, WIDTH, BATCH, LENGTH, SIDE, SOUND = 96, 64, 2, 12, 32, 800

Settings = dict[str, Any]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """A module and what its trace takes.

    Attributes:
        module: in eval mode.
        inputs: makes example inputs by name, other ones each time.
        free: the axes that may change, by input name.
    """

    module: nn.Module
    inputs: Callable[[], Inputs]
    free: Mapping[str, Mapping[int, str]]

    def feeds(self, count: int) -> list[dict[str, np.ndarray]]:
        """Random inputs, the same ones each time."""
        torch.manual_seed(0)
        return [{k: v.numpy() for k, v in self.inputs().items()} for _ in range(count)]


# ---------------------------------------------------------------------------------- kinds of input

_TOKENS = {0: "batch", 1: "length"}
FREE: Mapping[str, Mapping[int, str]] = {
    "input_ids": _TOKENS,
    "attention_mask": _TOKENS,
    "bbox": _TOKENS,
    "decoder_input_ids": {0: "batch", 1: "target"},
}
"""The axes that may change, by input; of others the first."""


def _ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, WORDS, (BATCH, length))


def _prompt() -> Inputs:
    return {"input_ids": _ids()}


def _few() -> Inputs:
    """So few tokens that a loop over them stays small."""
    return {"input_ids": _ids(4)}


def _text() -> Inputs:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, -3:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _page() -> Inputs:
    corner, size = torch.randint(0, 100, (2, BATCH, LENGTH, 2))
    return {**_text(), "bbox": torch.cat([corner, corner + size], dim=-1)}


def _pair() -> Inputs:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(7)}


def _image() -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, SIDE, SIDE)}


def _captioned() -> Inputs:
    return {**_prompt(), **_image()}


def _sound() -> Inputs:
    return {"input_values": torch.randn(BATCH, SOUND)}


def _random(name: str, *shape: int) -> Callable[[], Inputs]:
    return lambda: {name: torch.randn(BATCH, *shape)}


def _spoken(*shape: int) -> Callable[[], Inputs]:
    return lambda: {**_random("input_features", *shape)(), "decoder_input_ids": _ids(7)}


# ------------------------------------------------------------------------------------ transformers

_IDS: Settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS: Settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT: Settings = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "max_position_embeddings": 64, **_LAYERS, **_IDS,
}  # fmt: skip
_NARROW: Settings = {**_TEXT, "embedding_size": 32}
_GROUPED: Settings = {**_TEXT, "num_key_value_heads": 2, "head_dim": 16}
_LOCAL: Settings = {**_GROUPED, "sliding_window": 8}
_GPT: Settings = {
    "vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, **_IDS,
}  # fmt: skip
_BART: Settings = {
    "vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128, "max_position_embeddings": 64, "decoder_start_token_id": 1, **_IDS,
}  # fmt: skip
_T5: Settings = {
    "vocab_size": WORDS, "d_model": WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": 1,
    "num_heads": 4, "decoder_start_token_id": 0, **_IDS,
}  # fmt: skip
_IMAGES: Settings = {"image_size": SIDE, "patch_size": 8, "hidden_size": WIDTH, **_LAYERS}
_STAGES: Settings = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64]}
_PYRAMID: Settings = {**_STAGES, "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32}
_WINDOWS: Settings = {
    "image_size": SIDE, "patch_size": 2, "embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip
_WAVES: Settings = {
    "vocab_size": 32, "hidden_size": WIDTH, **_LAYERS, "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_BACKBONE: Settings = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
    "layer_type": "basic", "out_features": ["stage2"],
}  # fmt: skip
_DETR: Settings = {
    "use_timm_backbone": False, "backbone_config": _BACKBONE, "d_model": WIDTH, "num_queries": 5,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_labels": 3,
}  # fmt: skip
_MIXED: Settings = {**_GROUPED, "num_hidden_layers": 1, "num_experts_per_tok": 2}
_ONE_LAYER: Settings = {"num_hidden_layers": 1}
_STATES: Settings = {"vocab_size": WORDS, "hidden_size": WIDTH, **_ONE_LAYER, **_IDS}

Kind = dict[str, tuple[str, Callable[[], Inputs], Settings]]

# fmt: off
TRANSFORMERS: Mapping[str, Kind] = {
    "text encoder": {
        "albert": ("AlbertModel", _text, _NARROW),
        "bert": ("BertModel", _text, _TEXT),
        "convbert": ("ConvBertModel", _text, _NARROW),
        "deberta-v2": ("DebertaV2Model", _text, {
            **_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        "distilbert": ("DistilBertModel", _text, {
            "vocab_size": WORDS, "dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}),
        "fnet": ("FNetModel", _prompt, _TEXT),
        "layoutlm": ("LayoutLMModel", _page, {**_TEXT, "max_2d_position_embeddings": 256}),
        "mobilebert": ("MobileBertModel", _text, {**_NARROW, "intra_bottleneck_size": 32}),
        "modernbert": ("ModernBertModel", _text, {**_TEXT, "local_attention": 8}),
        "mpnet": ("MPNetModel", _text, _TEXT),
        "roformer": ("RoFormerModel", _text, _TEXT),
        "squeezebert": ("SqueezeBertModel", _text, {**_NARROW, "embedding_size": WIDTH}),
        "xlnet": ("XLNetModel", _prompt, {
            "vocab_size": WORDS, "d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 128}),
        "funnel": ("FunnelModel", _text, {
            "vocab_size": WORDS, "block_sizes": [1, 1], "d_model": WIDTH, "n_head": 4,
            "d_head": 16, "d_inner": 128}),
    },
    "decoder": {
        "bloom": ("BloomForCausalLM", _prompt, {
            "vocab_size": WORDS, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4, **_IDS}),
        "cohere": ("CohereForCausalLM", _prompt, _GROUPED),
        "falcon": ("FalconForCausalLM", _prompt, {**_TEXT, "num_kv_heads": 2}),
        "gemma3": ("Gemma3ForCausalLM", _prompt, {**_LOCAL, "query_pre_attn_scalar": 16}),
        "gpt-neo": ("GPTNeoForCausalLM", _prompt, {
            **_TEXT, "num_layers": 2, "num_heads": 4, "window_size": 8,
            "attention_types": [[["global", "local"], 1]]}),
        "gpt-neox": ("GPTNeoXForCausalLM", _prompt, _TEXT),
        "gpt2": ("GPT2LMHeadModel", _prompt, _GPT),
        "llama": ("LlamaForCausalLM", _text, _GROUPED),
        "mistral": ("MistralForCausalLM", _prompt, _LOCAL),
        "mpt": ("MptForCausalLM", _prompt, {
            "vocab_size": WORDS, "d_model": WIDTH, "n_heads": 4, "n_layers": 2,
            "max_seq_len": 64}),
        "opt": ("OPTForCausalLM", _prompt, {
            **_TEXT, "ffn_dim": 128, "word_embed_proj_dim": WIDTH}),
        "phi": ("PhiForCausalLM", _prompt, _TEXT),
        "qwen3": ("Qwen3ForCausalLM", _prompt, _GROUPED),
    },
    "mixture of experts": {
        "deepseek-v3": ("DeepseekV3ForCausalLM", _prompt, {
            **_TEXT, "num_hidden_layers": 1, "moe_intermediate_size": 32, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
            "first_k_dense_replace": 0}),
        "gpt-oss": ("GptOssForCausalLM", _prompt, {
            **_MIXED, "num_local_experts": 4, "sliding_window": 8}),
        "mixtral": ("MixtralForCausalLM", _prompt, {**_MIXED, "num_local_experts": 4}),
        "olmoe": ("OlmoeForCausalLM", _prompt, {**_MIXED, "num_experts": 4}),
        "qwen2-moe": ("Qwen2MoeForCausalLM", _prompt, {
            **_MIXED, "num_experts": 4, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64}),
    },
    "encoder and decoder": {
        "bart": ("BartForConditionalGeneration", _pair, _BART),
        "marian": ("MarianMTModel", _pair, _BART),
        "pegasus": ("PegasusForConditionalGeneration", _pair, _BART),
        "t5": ("T5ForConditionalGeneration", _pair, _T5),
    },
    "vision": {
        "beit": ("BeitModel", _image, _IMAGES),
        "clip": ("CLIPModel", _captioned, {
            "text_config": _TEXT, "vision_config": _IMAGES, "projection_dim": 32}),
        "convnext": ("ConvNextModel", _image, {**_STAGES, "layer_scale_init_value": 1.0}),
        "dinov2": ("Dinov2Model", _image, _IMAGES),
        "dpt": ("DPTForDepthEstimation", _image, {
            **_IMAGES, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 32, 32, 32], "fusion_hidden_size": 16}),
        "efficientnet": ("EfficientNetModel", _image, {
            "image_size": SIDE, "width_coefficient": 0.25, "depth_coefficient": 0.25,
            "hidden_dim": 320}),
        "focalnet": ("FocalNetModel", _image, {
            "image_size": SIDE, "embed_dim": 32, "depths": [1, 1], "focal_levels": [2, 2],
            "focal_windows": [3, 3], "hidden_sizes": [32, 64]}),
        "mobilenet-v2": ("MobileNetV2Model", _image, {"depth_multiplier": 0.25}),
        "mobilevit": ("MobileViTModel", _image, {
            "image_size": SIDE, "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64], "num_attention_heads": 4}),
        "poolformer": ("PoolFormerModel", _image, {**_STAGES, "layer_scale_init_value": 1.0}),
        "pvt": ("PvtModel", _image, {
            **_PYRAMID, "image_size": SIDE, "sequence_reduction_ratios": [2, 2, 1, 1]}),
        "resnet": ("ResNetModel", _image, {
            "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]}),
        "segformer": ("SegformerForSemanticSegmentation", _image, _PYRAMID),
        "swin": ("SwinModel", _image, _WINDOWS),
        "vit": ("ViTModel", _image, _IMAGES),
    },
    "detection": {
        "detr": ("DetrForObjectDetection", _image, _DETR),
        "deformable-detr": ("DeformableDetrForObjectDetection", _image, {
            **_DETR, "num_feature_levels": 1, "decoder_layers": 2}),
        "owlvit": ("OwlViTModel", _captioned, {
            "text_config": {**_TEXT, "max_position_embeddings": LENGTH},
            "vision_config": _IMAGES, "projection_dim": 32}),
        "rt-detr": ("RTDetrForObjectDetection", _image, {
            "backbone_config": {"model_type": "rt_detr_resnet", **_STAGES, "embedding_size": 16,
            "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]},
            "encoder_in_channels": [32, 32, 64], "encoder_hidden_dim": WIDTH,
            "encoder_ffn_dim": 128, "encoder_attention_heads": 4, "d_model": WIDTH,
            "num_queries": 5, "decoder_in_channels": [WIDTH] * 3, "decoder_ffn_dim": 128,
            "decoder_layers": 1, "decoder_attention_heads": 4}),
        "yolos": ("YolosForObjectDetection", _image, {
            **_IMAGES, "image_size": [SIDE, SIDE], "num_detection_tokens": 10}),
    },
    "speech": {
        "ast": ("ASTModel", _random("input_values", 64, 16), {
            **_IMAGES, "num_mel_bins": 16, "max_length": 64}),
        "sew": ("SEWModel", _sound, {**_WAVES, "squeeze_factor": 2}),
        "speech-to-text": ("Speech2TextForConditionalGeneration", _spoken(64, 16), {
            **_BART, "input_feat_per_channel": 16, "input_channels": 1, "conv_channels": 32,
            "max_source_positions": 64, "max_target_positions": 64}),
        "wav2vec2": ("Wav2Vec2ForCTC", _sound, _WAVES),
        "wav2vec2-bert": ("Wav2Vec2BertModel", _random("input_features", 24, 16), {
            **_TEXT, "feature_projection_input_dim": 16, "left_max_position_embeddings": 8,
            "right_max_position_embeddings": 4, "conv_depthwise_kernel_size": 5}),
        "wavlm": ("WavLMModel", _sound, _WAVES),
        "whisper": ("WhisperForConditionalGeneration", _spoken(16, 100), {
            **_BART, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 64}),
    },
    "state space": {
        "lfm2": ("Lfm2ForCausalLM", _prompt, {
            **_GROUPED, "layer_types": ["conv", "full_attention"]}),
        "mamba": ("MambaForCausalLM", _few, {**_STATES, "state_size": 4}),
        "mamba2": ("Mamba2ForCausalLM", _few, {
            **_STATES, "state_size": 4, "num_heads": 8, "head_dim": 16, "n_groups": 1,
            "chunk_size": 4}),
        "recurrent-gemma": ("RecurrentGemmaForCausalLM", _few, {
            **_TEXT, "attention_window_size": 8, "lru_width": WIDTH, "head_dim": 16,
            "block_types": ("recurrent", "attention")}),
        "rwkv": ("RwkvForCausalLM", _few, {
            **_STATES, "num_hidden_layers": 2, "attention_hidden_size": WIDTH}),
    },
    "time series": {
        "patchtst": ("PatchTSTForPrediction", _random("past_values", 32, 3), {
            "num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4,
            "d_model": WIDTH, "num_attention_heads": 4, "ffn_dim": 128, "num_hidden_layers": 2,
            "prediction_length": 8}),
        "patchtsmixer": ("PatchTSMixerForPrediction", _random("past_values", 32, 3), {
            "num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4,
            "d_model": WIDTH, "num_layers": 2, "prediction_length": 8}),
    },
}
# fmt: on
"""By kind and name: the class in transformers, its inputs, settings of its configuration."""

FIXED = ("funnel", "mamba", "mamba2", "recurrent-gemma", "rwkv")
"""Their code loops over tokens, or cuts them into as many pieces as there are: a fixed length."""

KINDS: Mapping[str, list[str]] = {
    **{kind: [*entries] for kind, entries in TRANSFORMERS.items()},
    "plain torch": [*PLAIN],
}


def example(name: str) -> Example:
    """A module by name, built anew."""
    torch.manual_seed(0)
    if name in PLAIN:
        module, inputs, free = PLAIN[name]
        return Example(module().eval(), inputs, free)
    import transformers

    (entry,) = (entries[name] for entries in TRANSFORMERS.values() if name in entries)
    model_class, inputs, settings = entry
    made = getattr(transformers, model_class)
    module = made(made.config_class(**settings)).eval()
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:  # transformers' own are so small that layers hardly matter
                weight.normal_(std=0.8 / (weight.numel() / weight.shape[0]) ** 0.5)
    _settle(module, inputs)
    batch = {0: "batch"}
    axes = {key: batch if name in FIXED else FREE.get(key, batch) for key in inputs()}
    return Example(module, inputs, axes)


def _settle(module: nn.Module, inputs: Callable[[], Inputs]) -> None:
    """Batch normalizations with the statistics of examples: what is deep would fade to nothing."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    if not norms:
        return
    batches = [inputs() for _ in range(16)]  # where one pixel is left, it takes many images
    with torch.no_grad():
        for part in norms:
            part.train().momentum = 1.0
            part.weight.fill_(1)
        module(**{key: torch.cat([batch[key] for batch in batches]) for key in batches[0]})
    module.eval()
