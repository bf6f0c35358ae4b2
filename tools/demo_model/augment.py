"""What cameras, scanners and codecs do to drawn pages, in batches on the device; and the targets that move along.

Turns uint8 pages into normalised patches, and marked points into "which vision token" for the training-only losses.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.demo_model.checkpoint import MEAN, STD

SLOTS_PER_TOKEN = 4  # characters of one token that the training-only head names, left to right


@dataclass
class Warp:
    """Per picture: forward 2x2 matrix about the centre and a shift, in pixels."""

    matrix: Tensor  # [n, 2, 2]
    shift: Tensor  # [n, 2]


@functools.lru_cache(maxsize=512)
def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """A small tensor made once, so that a captured step copies nothing from the host."""
    return torch.tensor(values, device=device)


def _uniform(shape: tuple[int, ...], low: float, high: float, device: torch.device) -> Tensor:
    return torch.rand(shape, device=device) * (high - low) + low


def random_warp(count: int, still: Tensor, strength: float | Tensor, device: torch.device) -> Warp:
    """Light rotation, shear, zoom and shift; identity where `still` [n] is true."""
    angle = _uniform((count,), -0.06, 0.06, device) * strength
    angle = angle * (torch.rand(count, device=device) < 0.6)
    zoom = 1 + _uniform((count,), -0.05, 0.03, device) * strength
    stretch = 1 + _uniform((count,), -0.05, 0.05, device) * strength
    shear = _uniform((count,), -0.08, 0.08, device) * strength * (torch.rand(count, device=device) < 0.3)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    zero = torch.zeros_like(zoom)
    size = torch.stack((torch.stack((zoom * stretch, shear), -1), torch.stack((zero, zoom / stretch), -1)), -2)
    shift = _uniform((count, 2), -4.0, 4.0, device) * strength
    still = still | (torch.rand(count, device=device) < 0.25)
    matrix = torch.where(still[:, None, None], constant(((1.0, 0.0), (0.0, 1.0)), device), turn @ size)
    return Warp(matrix, torch.where(still[:, None], torch.zeros_like(shift), shift))


def invert(matrix: Tensor) -> Tensor:
    """[n, 2, 2] -> its inverse."""
    a, b, c, d = matrix.flatten(1).unbind(1)
    adjugate = torch.stack((torch.stack((d, -b), -1), torch.stack((-c, a), -1)), -2)
    return adjugate / (a * d - b * c)[:, None, None]


def warp_pixels(pixels: Tensor, warp: Warp) -> Tensor:
    """[n, 3, h, w] resampled."""
    height, width = pixels.shape[-2:]
    size = constant((float(width), float(height)), pixels.device)
    inverse = invert(warp.matrix)
    # normalised output -> normalised input: S^-1 A^-1 S (u - S^-1 t), S = size / 2
    scaled = inverse * (size[None, None, :] / size[None, :, None])
    offset = -(scaled @ (2 * warp.shift / size)[..., None])
    grid = F.affine_grid(torch.cat((scaled, offset), -1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid.to(pixels.dtype), mode="bilinear", padding_mode="border", align_corners=False)


def warp_points(points: Tensor, warp: Warp, width: int, height: int) -> Tensor:
    """[n, k, 2] moved like the pixels."""
    center = constant((width / 2, height / 2), points.device)
    return (points - center) @ warp.matrix.transpose(1, 2) + center + warp.shift[:, None]


@functools.cache
def _dct(device: torch.device) -> tuple[Tensor, Tensor]:
    """[64, 64] cosine basis of flattened 8x8 blocks, and the [64] quantiser steps at quality 50 or so."""
    n = torch.arange(8, device=device, dtype=torch.float32)
    basis = torch.cos((2 * n[None] + 1) * n[:, None] * torch.pi / 16) / 2
    basis[0] /= 2**0.5
    return torch.kron(basis, basis), (10 + 9.0 * (n[:, None] + n[None])).flatten()


def jpeg(pixels: Tensor, coarse: Tensor) -> Tensor:
    """Quantise 8x8 blocks' frequencies; `coarse` [n]: 0 keeps, 1 is about quality 50, 3 about 20. Values 0..255."""
    n, channels, height, width = pixels.shape
    high, wide = height // 8 * 8, width // 8 * 8
    basis, steps = _dct(pixels.device)
    blocks = pixels[:, :, :high, :wide].reshape(n, channels, high // 8, 8, wide // 8, 8).transpose(3, 4)
    spectrum = (blocks.reshape(n, -1, 64) - 128) @ basis.T
    steps = steps * coarse.view(-1, 1, 1).clamp_min(0.02)
    blocks = ((spectrum / steps).round() * steps) @ basis + 128
    out = pixels.clone()
    blocks = blocks.view(n, channels, high // 8, wide // 8, 8, 8).transpose(3, 4)
    out[:, :, :high, :wide] = blocks.reshape(n, channels, high, wide)
    return out


def spoil(pixels: Tensor, strength: float | Tensor) -> Tensor:
    """Blur or sharpen, light and contrast, noise, JPEG; [n, 3, h, w] with values 0..255."""
    count, device = pixels.shape[0], pixels.device
    each = (count, 1, 1, 1)
    soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = _uniform(each, -0.4, 1.0, device) * (torch.rand(each, device=device) < 0.6) * strength
    pixels = pixels + amount * (soft - pixels)
    twice = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = _uniform(each, 0.0, 1.0, device) * (torch.rand(each, device=device) < 0.25) * strength
    pixels = pixels + amount * (twice - pixels)
    gain = 1 + _uniform(each, -0.2, 0.15, device) * strength
    pixels = (pixels - 128) * gain + 128 + _uniform(each, -20, 20, device) * strength
    sigma = _uniform(each, 0, 16, device) * (torch.rand(each, device=device) < 0.5) * strength
    pixels = pixels + torch.randn_like(pixels) * sigma
    coarse = _uniform((count,), 0.1, 2.5, device) * (torch.rand(count, device=device) < 0.4) * strength
    return jpeg(pixels.clamp(0, 255), coarse).clamp(0, 255)


def patchify(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, frames, 3, h, w] in 0..255 -> [n, patches, 588 * frames] in merge-block order, normalised."""
    mean, std = (constant(tuple(values), pixels.device).view(3, 1, 1) * 255 for values in (MEAN, STD))
    n, frames, _, height, width = pixels.shape
    x = ((pixels - mean) / std).to(dtype)
    x = x.view(n, frames, 3, height // 28, 2, 14, width // 28, 2, 14)
    if frames == 1:  # channel, height, width of the one frame that stands for two
        return x.permute(0, 3, 6, 4, 7, 1, 2, 5, 8).reshape(n, height * width // 196, 588)
    # [frame, channel, ...]: the same order in which PatchEmbed flattens its weights
    return x.permute(0, 3, 6, 4, 7, 1, 2, 5, 8).reshape(n, height * width // 196, frames * 588)


def token_of(points: Tensor, slot: Tensor, grids: tuple[tuple[int, int], ...], inside: Tensor) -> Tensor:
    """Index among the sample's vision tokens of every point [b, k, 2]; -1 where not `inside` or off the picture."""
    starts, total = [], 0
    for high, wide in grids:
        starts.append(total)
        total += high * wide
    rows = constant(tuple(grid[0] for grid in grids), points.device)[slot]
    columns = constant(tuple(grid[1] for grid in grids), points.device)[slot]
    first = constant(tuple(starts), points.device)[slot]
    x, y = (points[..., 0] / 28).floor().long(), (points[..., 1] / 28).floor().long()
    valid = inside & (x >= 0) & (y >= 0) & (x < columns) & (y < rows)
    return torch.where(valid, first + y * columns + x, -1)


def character_targets(token: Tensor, x: Tensor, kind: Tensor, tokens: int) -> Tensor:
    """[b, tokens, SLOTS]: the classes of each token's characters from left to right, 0 where none is left."""
    batch = token.shape[0]
    shown = (token >= 0) & (kind > 0)
    key = torch.where(shown, token.float() * 1024 + x.clamp(0, 1000), torch.full_like(x, 1e9))
    order = key.argsort(dim=1)
    token = torch.where(shown, token, tokens).gather(1, order)
    kind = kind.gather(1, order)
    index = torch.arange(token.shape[1], device=token.device).expand_as(token)
    new = torch.ones_like(token, dtype=torch.bool)
    new[:, 1:] = token[:, 1:] != token[:, :-1]
    rank = index - torch.where(new, index, 0).cummax(dim=1).values
    target = torch.zeros(batch, (tokens + 1) * (SLOTS_PER_TOKEN + 1), dtype=torch.long, device=token.device)
    place = token * (SLOTS_PER_TOKEN + 1) + rank.clamp_max(SLOTS_PER_TOKEN)
    target.scatter_(1, place, kind)
    return target.view(batch, tokens + 1, SLOTS_PER_TOKEN + 1)[:, :tokens, :SLOTS_PER_TOKEN]
