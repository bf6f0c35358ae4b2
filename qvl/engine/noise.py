"""The noise of sampling: a hash of (seed, position, token id), no generator's state.

A seeded answer is therefore the same whatever else runs beside it, and however often it was preempted. Knows numbers
only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def noise_keys(seeds: Sequence[int] | npt.NDArray[np.int64], positions: Sequence[int]) -> npt.NDArray[np.int32]:
    """Two 32-bit words per row from its 64-bit seed and its position (splitmix64, twice). -> [m, 2]"""
    state = np.asarray(seeds, dtype=np.int64).view(np.uint64)
    state = _mix64(_mix64(state) + np.asarray(positions, dtype=np.uint64))
    return state.view(np.int32).reshape(-1, 2)


def _mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise by hashing. int32 keys [m, 2], int32 ids [m or 1, c] -> float32 [m, c]"""
    bits = _mix32(_mix32(ids ^ keys[:, :1]) ^ keys[:, 1:])
    # Small uniforms decide whether an unlikely token wins, so they keep full precision: 31 bits, and never 0 or 1.
    uniform = ((bits & 0x7FFFFFFF).to(torch.float32) + 0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    exponential = uniform.neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _mix32(x: Tensor) -> Tensor:
    """A bijective 32-bit hash (two rounds of xor-shift and multiply); int32 products wrap on purpose."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
