"""Rotary position embeddings: the text decoder's three-axis form (M-RoPE) and the vision tower's two-axis form.

Knows how positions become angles; `qvl.kernels.fused.rotate` turns vectors by them. Does not know where positions come
from in a prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvl.types import Grid

VISION_THETA = 10000.0


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """theta ** (-2 i / dim) for i < dim / 2, fp32 on the CPU."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


class MRope:
    """Angles of the text decoder: frequency i follows the axis (t, h or w) whose section of `mrope_section` holds i.

    Holds only constants derived from the configuration, moved to `device` once.
    """

    def __init__(self, head_dim: int, theta: float, mrope_section: Sequence[int], device: torch.device) -> None:
        assert sum(mrope_section) * 2 == head_dim, (mrope_section, head_dim)
        self.inv_freq = inverse_frequencies(head_dim, theta).to(device)[:, None]
        sections = torch.tensor(mrope_section)
        self.axis = torch.repeat_interleave(torch.arange(len(mrope_section)), sections).to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:  # [3, n] -> cos, sin fp32 [n, 1, head_dim]
        angles = (positions.float()[self.axis] * self.inv_freq).T
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()


def vision_positions(grids: Sequence[Grid], merge_size: int) -> npt.NDArray[np.float32]:
    """Row and column of every patch in patch order (2 x 2 merge blocks, every temporal slice alike): [patches, 2]."""
    positions = []
    for grid in grids:
        rows, columns = np.meshgrid(np.arange(grid.h), np.arange(grid.w), indexing="ij")
        blocks = np.stack((rows, columns), axis=-1).reshape(
            grid.h // merge_size, merge_size, grid.w // merge_size, merge_size, 2
        )
        positions.append(np.tile(blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2), (grid.t, 1)))
    return np.concatenate(positions).astype(np.float32)


def vision_angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:  # fp32 [patches, 2]
    """cos, sin fp32 [patches, 1, head_dim]: half of the frequencies follow the row of a patch, half its column."""
    half = (positions[:, :, None] * frequencies_on(positions.device, head_dim // 2)).flatten(1)
    return tuple(torch.cat((x, x), dim=-1)[:, None] for x in (half.cos(), half.sin()))  # type: ignore[return-value]


@functools.cache
def frequencies_on(device: torch.device, dim: int) -> Tensor:
    """The tower's, copied to a device once."""
    return inverse_frequencies(dim, VISION_THETA).to(device)
