"""The same prompts through transformers and through qvl's network."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvl.models.registry import build_model
from qvl.models.weights import load_weights
from qvl.specs import load_spec
from qvl.types import Grid
from tests.models.pages import Pages

CASES = ("text", "picture", "pictures", "video", "video-and-picture")
_GRIDS: dict[str, tuple[tuple[str, Grid], ...]] = {
    "text": (),
    "picture": (("image", Grid(1, 4, 6)),),
    "pictures": (("image", Grid(1, 4, 6)), ("image", Grid(1, 2, 2)), ("image", Grid(1, 8, 4))),
    "video": (("video", Grid(3, 4, 4)),),
    "video-and-picture": (("video", Grid(2, 2, 6)), ("image", Grid(1, 6, 2)), ("image", Grid(1, 6, 2))),
}


@dataclass
class Case:
    """A prompt: token ids with pads, patches, grids in prompt order, and where each kind's pads are."""

    input_ids: Tensor
    pixel_values: Tensor
    grids: list[tuple[str, Grid]]


def make_case(config: Any, name: str) -> Case:
    """Random text around random patches, the same for the same name."""
    generator = torch.Generator().manual_seed(len(name))
    pads = {"image": config.image_token_id, "video": config.video_token_id}
    ids = torch.randint(0, 500, (9,), generator=generator).tolist()
    for kind, grid in _GRIDS[name]:
        ids += [config.vision_start_token_id] + [pads[kind]] * grid.num_tokens(2) + [config.vision_end_token_id]
        ids += torch.randint(0, 500, (5,), generator=generator).tolist()
    patches = sum(grid.num_patches for _, grid in _GRIDS[name])
    return Case(torch.tensor(ids), torch.randn(patches, 3 * 2 * 14 * 14, generator=generator), list(_GRIDS[name]))


@functools.cache
def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval()


@functools.cache
def load_ours(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = build_model(load_spec(folder), dtype, "cpu")
    load_weights(model, folder)
    return model


def media_arguments(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference takes pictures and videos apart."""
    chunks = case.pixel_values.to(dtype).split([grid.num_patches for _, grid in case.grids])
    arguments: dict[str, Tensor] = {}
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw"),
    ):  # fmt: skip
        own = [i for i, (k, _) in enumerate(case.grids) if k == kind]
        if own:
            arguments[pixels] = torch.cat([chunks[i] for i in own])
            shapes = [(case.grids[i][1].t, case.grids[i][1].h, case.grids[i][1].w) for i in own]
            arguments[grids] = torch.tensor(shapes)
    return arguments


def reference_positions(reference: Any, case: Case) -> Tensor:  # [3, n]
    media = {k: v for k, v in media_arguments(case, torch.float32).items() if k.endswith("thw")}
    return reference.model.get_rope_index(case.input_ids[None], **media)[0][:, 0]


@torch.inference_mode()
def reference_logits(reference: Any, case: Case) -> Tensor:  # fp32 [n, vocab]
    media = media_arguments(case, reference.dtype)
    return reference(input_ids=case.input_ids[None], **media, use_cache=False).logits[0].float()


def our_embeddings(model: Any, case: Case, config: Any) -> Tensor:  # [n, hidden]
    hidden = model.embed(case.input_ids)
    if case.grids:
        pads = (case.input_ids == config.image_token_id) | (case.input_ids == config.video_token_id)
        hidden[pads] = model.encode_media(case.pixel_values, [grid for _, grid in case.grids])
    return hidden


def our_logits(model: Any, case: Case, positions: Tensor, config: Any, chunk: int = 10_000) -> Tensor:
    """Prefill in chunks of at most `chunk` tokens: fp32 [n, vocab]."""
    pages = Pages(model, 1)
    hidden = our_embeddings(model, case, config)
    outputs = []
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        outputs += pages.step([(0, hidden[rows], positions[:, rows])])
    return model.logits(torch.cat(outputs))


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()
