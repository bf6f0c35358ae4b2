"""Checkpoint folders of the true Qwen2-VL shapes without weights: what `--load-format dummy` measures.

The tokenizer is made up (`bench.vocabulary`), with as many tokens as the published one. Knows published shapes.
Downloads nothing and writes no weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl.bench.vocabulary import CONTROL_TOKENS, NUM_PLAIN, write_tokenizer
from qvl.errors import ConfigError, suggest


@dataclass(frozen=True, slots=True)
class Shape:
    """What differs between the published sizes; the vision tower (depth 32, 1280 wide) is the same in all."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    tied: bool


SHAPES = {
    "2b": Shape(1536, 28, 12, 2, 8960, 151936, True),
    "7b": Shape(3584, 28, 28, 4, 18944, 152064, False),
    "72b": Shape(8192, 80, 64, 8, 29568, 152064, False),
}
_IDS = {text: NUM_PLAIN + place for place, text in enumerate(CONTROL_TOKENS)}
_PAD, _IM_END = _IDS["<|endoftext|>"], _IDS["<|im_end|>"]
_VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "num_heads": 16,
    "mlp_ratio": 4,
    "in_chans": 3,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_act": "quick_gelu",
}
_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def write_shape(name: str, folder: Path) -> Path:
    """Write the folder of shape `name` ("2b", "7b", "72b"): configuration and tokenizer, no weights.

    Raises `ConfigError` for an unknown name or a folder that holds something else.
    """
    shape = SHAPES.get(name.lower())
    if shape is None:
        raise ConfigError(f"unknown shape '{name}'{suggest(name, SHAPES)}; known: {', '.join(SHAPES)}")
    if any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} holds weights: name an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    _dump(folder / "config.json", _config(shape))
    _dump(folder / "preprocessor_config.json", _PROCESSOR)
    _dump(
        folder / "generation_config.json", {"eos_token_id": [_IM_END, _PAD], "pad_token_id": _PAD, "do_sample": False}
    )
    return folder


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": _IM_END,
        "pad_token_id": _PAD,
        "vision_start_token_id": _IDS["<|vision_start|>"],
        "vision_end_token_id": _IDS["<|vision_end|>"],
        "vision_token_id": _IDS["<|vision_pad|>"],
        "image_token_id": _IDS["<|image_pad|>"],
        "video_token_id": _IDS["<|video_pad|>"],
        "vision_config": {**_VISION, "hidden_size": shape.hidden_size},
    }


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
