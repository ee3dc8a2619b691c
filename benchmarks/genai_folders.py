"""Folders of onnxruntime-genai for every architecture that its model builder makes offline.

Weights are random and sizes small: a folder takes a tenth of a second to build, and shows how the
architecture's graph looks, what states it has, and whether onnxruntime runs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.zoo import cached

# The builder takes every layer of so many outputs for the last: no other may have them.
WORDS, WINDOW, MEL_BINS, FRAMES = 320, 16, 16, 3000

Settings = dict[str, Any]
_HEADS: Settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
_IDS: Settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES: Settings = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    **_HEADS,
    **_IDS,
}
_HEAD: Settings = {"head_dim": 16}
_GEMMA: Settings = {**_HEAD, "query_pre_attn_scalar": 16}
_LOCAL: Settings = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_CONV: Settings = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
_LINEAR: Settings = {
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
    },
}
_EXPERTS: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_IMAGES: Settings = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_IMAGES: Settings = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
}


def _text(**settings: Any) -> Settings:
    return {**_SIZES, **settings}


def _mrope(section: list[int]) -> Settings:
    return {"rope_scaling": {"rope_type": "default", "mrope_section": section}}


ARCHITECTURES: Mapping[str, tuple[str, str, Settings]] = {
    "ernie4.5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", _text(**_HEAD)),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _text(**_HEAD)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _text(**_GEMMA, sliding_window=WINDOW)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _text(**_GEMMA, **_LOCAL)),
    "gemma3-vl": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": _text(**_GEMMA, **_LOCAL),
            "vision_config": _IMAGES,
            "mm_tokens_per_image": 4,
        },
    ),
    "gemma4-unified": (
        "Gemma4UnifiedForConditionalGeneration",
        "Gemma4UnifiedConfig",
        {"text_config": _text(**_HEAD, **_LOCAL, global_head_dim=32, num_global_key_value_heads=2)},
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        _text(**_HEAD, **_LOCAL, num_local_experts=4, num_experts_per_tok=2),
    ),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _text()),
    "granite-hybrid": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        _text(num_local_experts=0, layer_types=["attention"] * 2, shared_intermediate_size=128),
    ),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", _text(**_HEAD)),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", _text(**_CONV)),
    "lfm2-moe": (
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        _text(**_CONV, **_EXPERTS, num_dense_layers=1),
    ),
    "lfm2-vl": (
        "Lfm2VlForConditionalGeneration",
        "Lfm2VlConfig",
        {
            "text_config": _text(**_CONV, model_type="lfm2"),
            "vision_config": {**_IMAGES, "model_type": "siglip2_vision_model"},
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _text()),
    "mistral": ("MistralForCausalLM", "MistralConfig", _text(sliding_window=WINDOW)),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": _text(**_HEAD, model_type="mistral", sliding_window=None),
            "vision_config": {**_IMAGES, "model_type": "pixtral"},
        },
    ),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", _text(head_dim=32)),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", _text()),
    "phi": ("PhiForCausalLM", "PhiConfig", _text(num_attention_heads=2)),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        _text(original_max_position_embeddings=256, sliding_window=WINDOW),
    ),
    "phi3-long": (
        "Phi3ForCausalLM",
        "Phi3Config",
        _text(
            max_position_embeddings=512,
            original_max_position_embeddings=256,
            rope_scaling={
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
            },
        ),
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _text()),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": _text(**_mrope([2, 3, 3])), "vision_config": _QWEN_IMAGES},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _text(**_HEAD)),
    "qwen3-vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": _text(**_HEAD, **_mrope([4, 2, 2])),
            "vision_config": {**_QWEN_IMAGES, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3.5": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {"text_config": _text(**_LINEAR), "vision_config": _QWEN_IMAGES},
    ),
    "qwen3.5-moe": (
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {
            "text_config": _text(**_LINEAR, **_EXPERTS, shared_expert_intermediate_size=32),
            "vision_config": _QWEN_IMAGES,
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _text()),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": WORDS,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_mel_bins": MEL_BINS,
            "max_source_positions": FRAMES // 2,
            "max_target_positions": 64,
            **_IDS,
            "decoder_start_token_id": 1,
        },
    ),
}
"""Class of the model in transformers, class of its configuration, and settings of that.

Left out are those whose code is not in transformers (ChatGLM, InternLM2, Phi-3-small, Phi-3-vision,
Phi-4-multimodal, LFM2-Audio, VideoChat-Flash), Phi-MoE, for which this builder fails, and Gemma 4
with experts, whose activation onnxruntime does not run on a CPU.
"""


def folder(name: str, *options: str) -> Path:
    """The folder of an architecture, built once for its settings.

    Args:
        options: of the builder, such as `exclude_embeds=true`.
    """
    said = json.dumps([ARCHITECTURES[name], WORDS, options])
    entry = f"architecture-{name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    return cached(entry, lambda out: _build(name, out, options))


def data(name: str, samples: int, length: int) -> dict[str, npt.NDArray[Any]]:
    """Random input of an architecture: tokens, and what else it needs."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, WORDS, (samples, length))
    if name != "whisper":
        return {"input_ids": ids}
    audio = rng.standard_normal((samples, MEL_BINS, FRAMES)).astype(np.float32)
    return {"input_ids": ids.astype(np.int32), "audio_features": audio}


def _build(name: str, out: Path, options: tuple[str, ...]) -> None:
    from onnxruntime_genai.models import builder

    with tempfile.TemporaryDirectory() as scratch, _quiet():
        _checkpoint(name, Path(scratch) / "hf")
        where = (None, str(Path(scratch) / "hf"), str(out), "fp32", "cpu", str(Path(scratch) / "c"))
        settings = builder.parse_extra_options(*where, ["hf_token=false", *options])
        _repair(name, settings["hf_details"]["hf_config"])
        builder.create_model(*where, **settings)


def _checkpoint(name: str, out: Path) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    model_class, config_class, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # transformers' own are so small that layers hardly matter
                weight.normal_(std=0.8 / weight.shape[-1] ** 0.5)
    model.save_pretrained(out)
    words = models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0")
    tokenizer = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(words), bos_token="w1", eos_token="w2", pad_token="w0"
    )
    tokenizer.save_pretrained(out)


def _repair(name: str, config: Any) -> None:
    """What the builder reads where transformers 5 no longer has it."""
    for part in (config, getattr(config, "text_config", config)):
        rope = getattr(part, "rope_parameters", None) or {}
        if name.startswith("gemma4"):
            part.allow_global_per_layer_attribute_access = True
            part.head_dim, part.global_head_dim, part.num_global_key_value_heads = 16, 32, 2
        elif "full_attention" in rope:
            theta, local = (rope[f"{kind}_attention"]["rope_theta"] for kind in ("full", "sliding"))
            part.rope_parameters = {"rope_type": "default", "rope_theta": theta, **rope}
            part.rope_theta, part.rope_local_base_freq = theta, local
        elif rope.get("rope_type") == "longrope":
            rope["type"] = "longrope"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
