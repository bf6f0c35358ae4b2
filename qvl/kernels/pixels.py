"""Resizing by Pillow's own arithmetic, for a GPU: weights in fixed point, computed once per pair of lengths.

Knows Pillow's bicubic filter and whether our kernels for pixels run. Does not know the order of patches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvl.kernels.gpu import gpu_problem, tried_out
from qvl.specs import ProcessorSpec

BITS = 22  # of a weight behind the point, so that sums of weights times 8 bits stay within 32
SUPPORT = 2.0  # source pixels on either side, where nothing becomes smaller
WRONG = 2e-2  # of numbers around 1; bfloat16 leaves half a hundredth
SLOWER = "torch's operations are used instead: half a millisecond more for every picture"


@dataclass(frozen=True, slots=True)
class Taps:
    """Output i is the sum over t of input `starts[i]` + t times `weights[t, i]` / 2^BITS; int32 [n] and [taps, n]."""

    starts: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)


@functools.lru_cache(256)
def taps_on(before: int, after: int, device: torch.device) -> Taps:
    """Of one axis that goes from `before` pixels to `after`. Not waited for."""
    numbers = taps_of(before, after)
    there = torch.from_numpy(numbers)
    if device.type == "cuda":
        there = there.pin_memory().to(device, non_blocking=True)
    return Taps(there[0], there[1:])


def taps_of(before: int, after: int) -> npt.NDArray[np.int32]:
    """int32 [1 + taps, after]: starts, then weights, as Pillow rounds them."""
    scale = before / after
    spread = max(scale, 1.0)
    center = (np.arange(after) + 0.5) * scale
    first = np.maximum(np.trunc(center - SUPPORT * spread + 0.5), 0).astype(np.int64)
    last = np.minimum(np.trunc(center + SUPPORT * spread + 0.5), before).astype(np.int64)
    at = first + np.arange((last - first).max())[:, None]
    weights = np.where(at < last, bicubic(np.abs(at - center + 0.5) * (1 / spread)), 0.0)
    weights /= np.cumsum(weights, axis=0)[-1]  # one after the other, as Pillow adds them
    rounded = np.trunc(weights * (1 << BITS) + np.where(weights < 0, -0.5, 0.5))
    return np.concatenate((first[None], rounded)).astype(np.int32)


def bicubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@functools.cache
def pixel_kernels(spec: ProcessorSpec, dtype: torch.dtype) -> Any | None:
    """`qvl.kernels.on_gpu.pixel_patches` where it makes these patches on the current GPU, None elsewhere."""
    if gpu_problem() is not None:
        return None
    return tried_out("pixel_patches", "the kernel that makes patches", lambda k: problem_of(k, spec, dtype), SLOWER)


def problem_of(kernels: Any, spec: ProcessorSpec, dtype: torch.dtype, device: str = "cuda") -> str | None:
    """A picture of one grey becomes patches of one number for each colour, when it is made smaller and larger."""
    side = spec.factor
    grey = torch.full((1, side + 5, side - 5, 3), 200, dtype=torch.uint8, device=device)
    mean, std = torch.tensor(spec.image_mean), torch.tensor(spec.image_std)
    expected = ((200 / 255 - mean) / std)[:, None]
    found = kernels.patches(grey, side, side, spec, dtype).cpu().float().unflatten(1, (3, -1))
    error = float((found - expected).abs().max())
    return None if error < WRONG else f"the kernel that makes patches gave wrong numbers (off by {error:.1e})"
