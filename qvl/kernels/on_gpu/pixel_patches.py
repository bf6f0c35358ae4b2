"""Pixels to normalised patches in two launches: resized across, then down and in the order of patches.

Both passes round to whole grey levels with Pillow's weights in fixed point: each is Pillow's to the bit.
Knows tensors. Does not know requests. Importing this file imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels import pixels as fixed_point
from qvl.kernels.gpu import cdiv, launch, next_power_of_2
from qvl.kernels.pixels import taps_on
from qvl.specs import ProcessorSpec

BLOCK = 512  # numbers of a row that one program makes
BITS = tl.constexpr(fixed_point.BITS)
HALF = tl.constexpr(1 << (fixed_point.BITS - 1))


def patches(pixels: Tensor, height: int, width: int, spec: ProcessorSpec, dtype: torch.dtype) -> Tensor:
    """uint8 [n, h, w, 3], contiguous: as `qvl.models.preprocess.patchify`."""
    count, tall, wide = pixels.shape[:3]
    if wide != width:
        taps = taps_on(wide, width, pixels.device)
        narrow = pixels
        pixels = torch.empty((count, tall, width, 3), dtype=torch.uint8, device=pixels.device)
        launch(
            _across, (count * tall, cdiv(width * 3, BLOCK)), narrow, pixels, taps.starts, taps.weights,
            wide, width, len(taps), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    taps = taps_on(tall, height, pixels.device)
    patch, frames = spec.patch_size, spec.temporal_patch_size
    size = 3 * frames * patch * patch
    number = cdiv(count, frames) * (height // patch) * (width // patch)
    out = torch.empty((number, size), dtype=dtype, device=pixels.device)
    launch(
        _down, (number,), pixels, out, taps.starts, taps.weights, count, tall, height, width, len(taps),
        *map(float, spec.image_mean), *map(float, spec.image_std), PATCH=patch, FRAMES=frames, MERGE=spec.merge_size,
        SIZE=size, BLOCK=next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["wide", "width", "taps"])
def _across(pixels_ptr, out_ptr, starts_ptr, weights_ptr, wide, width, taps, BLOCK: tl.constexpr):
    """One program: BLOCK numbers of one row, [wide, 3] -> [width, 3]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < width * 3
    column, channel = at // 3, at % 3
    start = tl.load(starts_ptr + column, mask=live, other=0)
    source = pixels_ptr + row * wide * 3 + start * 3 + channel
    total = tl.full((BLOCK,), HALF, tl.int32)
    for t in range(taps):
        weight = tl.load(weights_ptr + t * width + column, mask=live, other=0)
        value = tl.load(source + t * 3, mask=live & (start + t < wide), other=0)
        total += weight * value.to(tl.int32)
    level = tl.minimum(tl.maximum(total >> BITS, 0), 255)
    tl.store(out_ptr + row * width * 3 + at, level.to(tl.uint8), mask=live)


@triton.jit(do_not_specialize=["count", "tall", "height", "width", "taps"])
def _down(
    pixels_ptr, out_ptr, starts_ptr, weights_ptr, count, tall, height, width, taps,
    mean0, mean1, mean2, std0, std1, std2,
    PATCH: tl.constexpr, FRAMES: tl.constexpr, MERGE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one patch, [channel, frame, row, column], out of [count, tall, width, 3]."""
    number = tl.program_id(0)
    inner, block = number % (MERGE * MERGE), number // (MERGE * MERGE)
    across = width // (PATCH * MERGE)
    down = height // (PATCH * MERGE)
    top = (block // across % down * MERGE + inner // MERGE) * PATCH
    left = (block % across * MERGE + inner % MERGE) * PATCH
    at = tl.arange(0, BLOCK)
    live = at < SIZE
    channel = at // (FRAMES * PATCH * PATCH)
    frame = tl.minimum(block // (across * down) * FRAMES + at // (PATCH * PATCH) % FRAMES, count - 1)
    row, column = top + at // PATCH % PATCH, left + at % PATCH
    start = tl.load(starts_ptr + row, mask=live, other=0)
    source = pixels_ptr + ((frame.to(tl.int64) * tall + start) * width + column) * 3 + channel
    total = tl.full((BLOCK,), HALF, tl.int32)
    for t in range(taps):
        weight = tl.load(weights_ptr + t * height + row, mask=live, other=0)
        value = tl.load(source + t * width * 3, mask=live & (start + t < tall), other=0)
        total += weight * value.to(tl.int32)
    level = tl.minimum(tl.maximum(total >> BITS, 0), 255).to(tl.float32)
    mean = tl.where(channel == 0, mean0, tl.where(channel == 1, mean1, mean2))
    std = tl.where(channel == 0, std0, tl.where(channel == 1, std1, std2))
    normal = (level * (1 / 255) - mean) / std
    tl.store(out_ptr + number.to(tl.int64) * SIZE + at, normal.to(out_ptr.dtype.element_ty), mask=live)
