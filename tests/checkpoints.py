"""Writes tiny Qwen2-VL checkpoint folders with random weights: the models of every test.

Three variants in which every dimension differs. They are written with transformers, the oracle, and read by qvl;
nothing here imports qvl. Greedy decoding of them is varied (large initial values), and their vocabularies are smaller
than their embeddings, as in the published checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

KeyStyle = Literal["old", "mid"]  # `visual.*`, `model.layers.*` | `model.visual.*`, `model.language_model.layers.*`
ConfigStyle = Literal["flat", "nested"]
VARIANTS = ("plain", "tied", "deep")

CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN_ADDED_TOKENS = ("<tool_call>", "</tool_call>")  # added, but not flagged special, as in Qwen2.5

# The template that Qwen2-VL checkpoints carry.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT: dict[str, dict[str, Any]] = {
    "plain": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 608, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "mrope_section": [2, 3, 3],
    },
    "tied": {
        "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1,
        "intermediate_size": 136, "vocab_size": 640, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "max_position_embeddings": 2048, "tie_word_embeddings": True, "mrope_section": [4, 6, 6],
    },
    "deep": {
        "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3,
        "intermediate_size": 80, "vocab_size": 593, "rms_norm_eps": 2e-6, "rope_theta": 500_000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, "mrope_section": [2, 1, 1],
    },
}  # fmt: skip
_VISION: dict[str, dict[str, Any]] = {
    "plain": {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 4},
    "tied": {"depth": 3, "embed_dim": 48, "num_heads": 4, "mlp_ratio": 3},
    "deep": {"depth": 1, "embed_dim": 40, "num_heads": 5, "mlp_ratio": 2},
}
_GENERATION: dict[str, dict[str, Any]] = {
    "plain": {"do_sample": False},
    "tied": {"do_sample": True, "temperature": 0.01, "top_p": 0.001, "top_k": 1, "repetition_penalty": 1.05},
    "deep": {},
}


def write_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    variant: str = "plain",
    dtype: str = "float32",
    key_style: KeyStyle = "old",
    config_style: ConfigStyle = "flat",
    rope_spelling: dict[str, Any] | None = None,
    num_shards: int = 1,
    no_weights: bool = False,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """Write one checkpoint into `folder` (made when missing) and return it.

    `dtype` is "float32", "bfloat16" or "float16". `key_style` names the tensors as older or newer files do.
    `config_style` "nested" writes `text_config` and `rope_parameters`, which transformers 4.57 does not read.
    `rope_spelling` replaces `rope_scaling` but for `mrope_section`. `num_shards` above 1 writes an index. `no_weights`
    leaves the weights out (`--load-format dummy`). `text` and `vision` override single values of the variant.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder, variant)
    config = _config(variant, ids, dtype, rope_spelling, text or {}, vision or {})
    _dump(folder / "config.json", config)  # flat: what transformers builds the weights from
    generation = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"]}
    _dump(folder / "generation_config.json", {**generation, **_GENERATION[variant]})
    _write_processor(folder)
    if not no_weights:
        _write_weights(folder, config, seed, dtype, key_style, num_shards)
    if config_style == "nested":
        _dump(folder / "config.json", _nested(config))
    return folder


def write_tokenizer(folder: Path, variant: str = "plain") -> dict[str, int]:
    """A byte-level BPE of about 570 tokens with Qwen2-VL's control tokens; returns the ids of the added tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=560, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(_SENTENCES[VARIANTS.index(variant) :], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in PLAIN_ADDED_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in CONTROL_TOKENS + PLAIN_ADDED_TOKENS}
    _write_tokenizer_config(folder, variant, ids)
    return ids


def _write_tokenizer_config(folder: Path, variant: str, ids: dict[str, int]) -> None:
    """The template goes to a different place in each variant: all three are found in published checkpoints."""
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(id): {"content": name, "special": name in CONTROL_TOKENS, **plain} for name, id in ids.items()
        },
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
    }
    if variant == "deep":
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    else:
        config["chat_template"] = CHAT_TEMPLATE
    if variant == "plain":
        _dump(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _dump(folder / "tokenizer_config.json", config)


def _config(
    variant: str,
    ids: dict[str, int],
    dtype: str,
    rope_spelling: dict[str, Any] | None,
    text_changes: dict[str, Any],
    vision_changes: dict[str, Any],
) -> dict[str, Any]:
    text = {**_TEXT[variant], **text_changes}
    section = text.pop("mrope_section")
    patches = {"in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **text,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "max_window_layers": text["num_hidden_layers"],
        "sliding_window": 4096,
        "rope_scaling": {**(rope_spelling or {"type": "mrope"}), "mrope_section": section},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "torch_dtype": dtype,
        "vision_config": {
            "hidden_size": text["hidden_size"], "hidden_act": "quick_gelu",
            **_VISION[variant], **patches, **vision_changes,
        },
    }  # fmt: skip


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The same config as newer releases of transformers write it."""
    config = dict(flat)
    moved = [*_TEXT["plain"], "hidden_act", "use_sliding_window", "max_window_layers", "sliding_window"]
    text = {key: config.pop(key) for key in moved if key in config}
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), "type": "default"}
    text["rope_parameters"] = {**rope, "mrope_section": config.pop("rope_scaling")["mrope_section"]}
    config["tie_word_embeddings"] = text.pop("tie_word_embeddings")
    config["dtype"] = config.pop("torch_dtype")
    text["model_type"] = "qwen2_vl_text"
    return {**config, "text_config": text}


def _write_processor(folder: Path) -> None:
    image = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
        "min_pixels": 56 * 56, "max_pixels": 64 * 28 * 28, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    _dump(folder / "preprocessor_config.json", image)
    video = {
        "video_processor_type": "Qwen2VLVideoProcessor", "fps": 2, "min_frames": 4, "max_frames": 16,
        "size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}, "total_pixels": 128 * 28 * 28,
    }  # fmt: skip
    _dump(folder / "video_preprocessor_config.json", video)


def _write_weights(
    folder: Path, config: dict[str, Any], seed: int, dtype: str, key_style: KeyStyle, num_shards: int
) -> None:
    from safetensors.torch import save_file

    tensors = {_spell(name, key_style): tensor for name, tensor in _random_weights(config, seed, dtype).items()}
    names = sorted(tensors)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    place = {name: f"model-{i % num_shards + 1:05}-of-{num_shards:05}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(place.values())):
        shard = {name: tensors[name] for name in names if place[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    _dump(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": place})


def _random_weights(config: dict[str, Any], seed: int, dtype: str) -> dict[str, Any]:
    """Tensors by transformers' in-memory names; matrices keep the size of what they multiply: no layer dies out."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    values = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype")}
    values["rope_scaling"] = {"type": "mrope", "mrope_section": config["rope_scaling"]["mrope_section"]}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**json.loads(json.dumps(values))))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = (
                1.0 if name.endswith("weight") else 0.0
            ) + 0.1 * noise  # one-dimensional weights are norms
        elif "embed_tokens" in name:  # small where tied, or every token would predict itself
            parameter.data = noise * (0.2 if config["tie_word_embeddings"] else 1.0)
        else:
            parameter.data = noise * 1.5 / parameter[0].numel() ** 0.5
    names = {name for name, _ in model.named_parameters()}  # a tied lm_head appears once, as the embedding
    weights = {name: t for name, t in model.state_dict().items() if name in names}
    return {name: t.to(getattr(torch, dtype)).contiguous() for name, t in weights.items()}


def _spell(name: str, style: KeyStyle) -> str:
    if style == "mid":
        return name
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


_SENTENCES = (
    "The quick brown fox jumps over the lazy dog. Which picture says hello?\n",
    "Describe this picture in one sentence. There is a red square and a blue circle.\n",
    "Read the text in the image, line by line, and answer: what is the total of 12.50 and 7.25?\n",
    "system user assistant You are a helpful assistant. Picture 1: Video 2: table | cell | value\n",
    "请描述这张图片。这是什么？图中有一只猫和一只狗。你好，世界！\n",
    "It's a photo; they're looking at 3 signs, and we'll see that the first one isn't in English.\n",
    "The words of the video, in order: one two three four five six seven eight nine ten.\n",
    "What colour is the largest shape? The largest shape is a green triangle near the left border.\n",
)
