"""A product that whoever reads it finishes: so is it computed sooner, and the reader has to touch every number anyway.

Knows the arithmetic. Does not know which product leaves what, or who reads it. What reads it on a GPU is in
`qvl.kernels.on_gpu.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sums:
    """The sum of parts, times factor and a scale per row and column where there are some, plus a bias: [n, width]."""

    parts: Tensor  # [parts, n, width] in fp32, or in `dtype`
    dtype: torch.dtype  # of what it stands for
    factor: float = 1.0
    row_scales: Tensor | None = None  # fp32 [n, 1]
    column_scales: Tensor | None = None  # fp32 [width]
    bias: Tensor | None = None  # [width]

    def __len__(self) -> int:
        return self.parts.shape[1]


def memory_of(x: Tensor | Sums) -> Tensor:
    return x if isinstance(x, Tensor) else x.parts


def finished(x: Tensor | Sums) -> Tensor:
    """What it stands for, by torch."""
    if isinstance(x, Tensor):
        return x
    if len(x.parts) == 1 and x.parts.dtype == x.dtype and x.row_scales is x.column_scales is x.bias is None:
        return x.parts[0]
    out = x.parts.float().sum(0)
    if x.row_scales is not None:
        out *= x.row_scales * x.factor
    if x.column_scales is not None:
        out *= x.column_scales
    if x.bias is not None:
        out += x.bias
    return out.to(x.dtype)
