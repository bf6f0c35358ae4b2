"""Pixels to patches, on whatever device the pixels are.

Knows the order of patches and of the numbers in a patch, normalisation, and resizing on the device. Works in parts, so
that a picture of any size takes little memory beside its pixels and its patches. Does not know files, requests or the
network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels.pixels import pixel_kernels
from qvl.specs import ProcessorSpec

AT_ONCE = 1 << 22  # pixels whose fp32 numbers are in memory at a time
FEWEST_LINES = 8


def patchify(
    pixels: Tensor, height: int, width: int, spec: ProcessorSpec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 [frames, h, w, 3] on any device: [patches, 3 * temporal_patch_size * patch_size ** 2] of `dtype`.

    Frames whose size is not (height, width) are resized; the last frame is repeated until the count is a multiple of
    temporal_patch_size (a picture is one frame). Patches run over (slice, merge-block row, merge-block column, row in
    block, column in block), the numbers of a patch over (channel, frame, row, column), as the reference's.
    A GPU does it in two launches where our kernels run.
    """
    if pixels.is_cuda and (kernels := pixel_kernels(spec, dtype)) is not None:
        made: Tensor = kernels.patches(pixels.contiguous(), height, width, spec, dtype)
        return made
    frames = resize(pixels.permute(0, 3, 1, 2), height, width)
    missing = -frames.shape[0] % spec.temporal_patch_size
    if missing:
        frames = torch.cat((frames, frames[-1:].expand(missing, -1, -1, -1)))
    slices = frames.unflatten(0, (-1, spec.temporal_patch_size))  # [slices, frames of a patch, channels, h, w]
    if slices.shape[0] * slices[0, :, 0].numel() <= AT_ONCE:
        return arrange(slices, spec, dtype)
    each = max(1, AT_ONCE // slices[0, :, 0].numel())
    bands = max(1, AT_ONCE // (spec.temporal_patch_size * width * spec.factor)) * spec.factor
    rows, row_patches = height // spec.factor, width // spec.factor * spec.merge_size**2
    size = slices.shape[1] * slices.shape[2] * spec.patch_size**2
    patches = torch.empty((slices.shape[0], rows * row_patches, size), dtype=dtype, device=pixels.device)
    for first in range(0, slices.shape[0], each):
        for top in range(0, height, bands):
            part = slices[first : first + each, ..., top : top + bands, :]
            start = top // spec.factor * row_patches
            arranged = arrange(part, spec, dtype).unflatten(0, (part.shape[0], -1))
            patches[first : first + each, start : start + arranged.shape[1]] = arranged
    return patches.flatten(0, 1)


def arrange(slices: Tensor, spec: ProcessorSpec, dtype: torch.dtype) -> Tensor:
    """uint8 [slices, frames of a patch, channels, h, w]: their patches in order, normalised."""
    size, merge = spec.patch_size, spec.merge_size
    count, frames, channels, height, width = slices.shape
    blocks = normalise(slices, spec).to(dtype).reshape(
        count, frames, channels, height // spec.factor, merge, size, width // spec.factor, merge, size
    )  # fmt: skip
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * frames * size * size)


def resize(frames: Tensor, height: int, width: int) -> Tensor:  # uint8 [n, c, h, w] -> uint8 [n, c, height, width]
    """Bicubic with antialias as Pillow does it: rows first, whole grey levels in between, then columns.

    Overshoot at edges is clamped after each pass; one pass over both axes would differ from Pillow by dozens of levels.
    """
    if frames.shape[3] != width:
        frames = resize_axis(frames, 3, width)
    return resize_axis(frames, 2, height) if frames.shape[2] != height else frames


def resize_axis(frames: Tensor, axis: int, length: int) -> Tensor:
    """One pass along axis 2 or 3; lines across it are independent, so some of them are computed at a time.

    Never one alone: torch 2.13 gives other numbers for a picture that is one pixel wide, on a CPU.
    """
    other = 5 - axis
    shape = list(frames.shape)
    shape[axis] = length
    resized = torch.empty(shape, dtype=torch.uint8, device=frames.device)
    longest = max(frames.shape[axis], length)
    parts = -(-frames.shape[other] // max(FEWEST_LINES, AT_ONCE // longest))
    each = max(1, AT_ONCE // (longest * frames.shape[other]))
    for group, out in zip(frames.split(each), resized.split(each), strict=True):
        for part, place in zip(group.tensor_split(parts, other), out.tensor_split(parts, other), strict=True):
            size = (part.shape[2], length) if axis == 3 else (length, part.shape[3])
            wide = F.interpolate(part.float(), size, mode="bicubic", antialias=True, align_corners=False)
            place.copy_(wide.round_().clamp_(0, 255))
    return resized


def normalise(frames: Tensor, spec: ProcessorSpec) -> Tensor:  # uint8 [..., 3, h, w] -> fp32
    """(value / 255 - mean) / std per channel."""
    wide = frames.float().mul_(1 / 255)
    for channel, (mean, std) in enumerate(zip(spec.image_mean, spec.image_std, strict=True)):
        wide.select(-3, channel).sub_(mean).div_(std)
    return wide
