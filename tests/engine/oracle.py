"""What transformers answers to a conversation: its template, slow picture processor, network and greedy search."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

Dialogue = list[dict[str, Any]]
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class Oracle:
    """One checkpoint in transformers. Answers have a fixed length: end tokens do not end them."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.pictures = Qwen2VLImageProcessor.from_pretrained(folder)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.repetition_penalty = self.model.generation_config.repetition_penalty or 1.0
        self.model.generation_config.eos_token_id = None
        self.suppressed = [self.tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS]

    def inputs(self, dialogue: Dialogue) -> dict[str, torch.Tensor]:
        """What `generate` takes: ids with pads expanded, patches and grids."""
        text = self.tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
        extra: dict[str, torch.Tensor] = {}
        for kind, values, grids in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            sources = [part[kind] for turn in dialogue for part in parts_of(turn) if kind in part]
            if not sources:
                continue
            encoded = [self._patches(source) for source in sources]
            extra[values] = torch.cat([patches for patches, _ in encoded])
            extra[grids] = torch.tensor([grid for _, grid in encoded])
            for _, (t, h, w) in encoded:
                text = text.replace(f"<|{kind}_pad|>", "<|placeholder|>" * (t * h * w // 4), 1)
            text = text.replace("<|placeholder|>", f"<|{kind}_pad|>")
        ids = self.tokenizer(text, return_tensors="pt")
        if extra and "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            # transformers from 5.x on asks what stands where instead of looking for pads.
            image, video = (ids["input_ids"] == self._pad(kind) for kind in ("image", "video"))
            extra["mm_token_type_ids"] = image.int() + 2 * video.int()
        return {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], **extra}

    def _pad(self, kind: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>")

    def _patches(self, source: Any) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """A picture, or a list of them that needs no resizing as the frames of a video."""
        if isinstance(source, list):
            frames = [np.asarray(frame) for frame in source]
            own = ("rescale_factor", "image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size")
            settings = {name: getattr(self.pictures, name) for name in own}
            flat, grid = self.pictures._preprocess(
                frames, do_resize=False, do_rescale=True, do_normalize=True, do_convert_rgb=False, **settings
            )
            return torch.from_numpy(np.asarray(flat)), tuple(grid)
        made = self.pictures(source, return_tensors="pt")
        return made["pixel_values"], tuple(made["image_grid_thw"][0].tolist())

    @torch.inference_mode()
    def greedy(self, dialogue: Dialogue, num_tokens: int) -> list[int]:
        """The first `num_tokens` tokens of the answer."""
        inputs = self.inputs(dialogue)
        output = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=num_tokens,
            repetition_penalty=self.repetition_penalty,
            suppress_tokens=self.suppressed,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        return output[0, inputs["input_ids"].shape[1] :].tolist()


@cache
def oracle(folder: Path) -> Oracle:
    """One per checkpoint and test process."""
    return Oracle(folder)


def parts_of(turn: dict[str, Any]) -> list[dict[str, Any]]:
    content = turn["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Coloured blobs, the same for the same arguments."""
    noise = np.random.default_rng([seed, height, width]).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def user(*parts: Any) -> dict[str, Any]:
    """A user's turn from texts, pictures and (lists of pictures) videos."""

    def part(value: Any) -> dict[str, Any]:
        kind = {str: "text", list: "video"}.get(type(value), "image")
        return {"type": kind, kind: value}

    return {"role": "user", "content": [part(value) for value in parts]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}
