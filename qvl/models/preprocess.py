"""Pixels to patches, on whatever device the pixels are.

Knows the order of patches and of the numbers in a patch, normalisation, and resizing on the device. Does not know
files, requests or the network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.specs import ProcessorSpec


def patchify(pixels: Tensor, height: int, width: int, spec: ProcessorSpec) -> Tensor:
    """uint8 [frames, h, w, 3] on any device: fp32 [patches, 3 * temporal_patch_size * patch_size ** 2].

    Frames whose size is not (height, width) are resized; the last frame is repeated until the count is a multiple of
    temporal_patch_size (a picture is one frame). Patches run over (slice, merge-block row, merge-block column, row in
    block, column in block), the numbers of a patch over (channel, frame, row, column), as the reference's.
    """
    size, merge, frames_per_patch = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    frames = pixels.permute(0, 3, 1, 2)
    frames = normalise(resize(frames, height, width), spec)
    missing = -frames.shape[0] % frames_per_patch
    if missing:
        frames = torch.cat((frames, frames[-1:].expand(missing, -1, -1, -1)))
    blocks = frames.reshape(
        frames.shape[0] // frames_per_patch, frames_per_patch, frames.shape[1],
        height // spec.factor, merge, size, width // spec.factor, merge, size,
    )  # fmt: skip
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, frames.shape[1] * frames_per_patch * size * size)


def resize(frames: Tensor, height: int, width: int) -> Tensor:  # uint8 [n, c, h, w] -> uint8 [n, c, height, width]
    """Bicubic with antialias as Pillow does it: rows first, whole grey levels in between, then columns.

    Overshoot at edges is clamped after each pass; one pass over both axes would differ from Pillow by dozens of levels.
    """
    for size in ((frames.shape[2], width), (height, width)):
        if tuple(frames.shape[2:]) != size:
            wide = F.interpolate(frames.float(), size, mode="bicubic", antialias=True, align_corners=False)
            frames = wide.round_().clamp_(0, 255).to(torch.uint8)
    return frames


def normalise(frames: Tensor, spec: ProcessorSpec) -> Tensor:  # uint8 [n, 3, h, w] -> fp32
    """(value / 255 - mean) / std per channel."""
    mean = torch.tensor(spec.image_mean, dtype=torch.float32, device=frames.device)[:, None, None]
    std = torch.tensor(spec.image_std, dtype=torch.float32, device=frames.device)[:, None, None]
    return frames.float().mul_(1 / 255).sub_(mean).div_(std)
