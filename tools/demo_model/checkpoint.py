"""The checkpoint folder: configs, tokenizer and bfloat16 weights in Hugging Face layout; and reading weights back."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tools.demo_model.model import DemoModel, Shape, hf_config
from tools.demo_model.vocab import SPECIAL, save_tokenizer

MIN_PIXELS, MAX_PIXELS = 64 * 28 * 28, 256 * 28 * 28
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


def processor_config() -> dict[str, Any]:
    return {
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": MEAN,
        "image_std": STD,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }


def generation_config() -> dict[str, Any]:
    """Greedy in effect, spelled as Qwen2-VL spells it."""
    return {
        "bos_token_id": SPECIAL["<|endoftext|>"],
        "pad_token_id": SPECIAL["<|endoftext|>"],
        "eos_token_id": [SPECIAL["<|im_end|>"], SPECIAL["<|endoftext|>"]],
        "do_sample": False,
        "repetition_penalty": 1.0,
        "max_new_tokens": 512,
    }


def save_checkpoint(model: DemoModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    configs = {
        "config.json": hf_config(model.shape, SPECIAL),
        "generation_config.json": generation_config(),
        "preprocessor_config.json": processor_config(),
    }
    for name, config in configs.items():
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(folder)
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def shape_of(folder: Path) -> Shape:
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    return Shape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        mrope_section=tuple(config["rope_scaling"]["mrope_section"]),
        rope_theta=config["rope_theta"],
        vision_size=vision["embed_dim"],
        vision_depth=vision["depth"],
        vision_heads=vision["num_heads"],
        mlp_ratio=vision["mlp_ratio"],
        rms_norm_eps=config["rms_norm_eps"],
    )


def load_checkpoint(folder: Path) -> DemoModel:
    model = DemoModel(shape_of(folder))
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return model
