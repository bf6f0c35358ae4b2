"""Linear layers whose rows may be several projections of the checkpoint stored as one matrix.

Knows its weight, its bias and how many rows each part has. Does not know how the product is computed on a device:
that is `qvl.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qvl.kernels.linear import linear


class Linear(nn.Module):
    """y = x W^T + b with W [sum(parts), in_features].

    `parts` are the row counts of the merged projections in order (q, k, v or gate, up); an ordinary layer has one.
    The matrix has `dtype`, the bias the dtype of the activations.
    """

    def __init__(
        self,
        in_features: int,
        parts: int | Sequence[int],
        *,
        bias: bool,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.parts = (parts,) if isinstance(parts, int) else tuple(parts)
        rows = sum(self.parts)
        self.weight = nn.Parameter(torch.empty(rows, in_features, dtype=dtype, device="meta"), requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(rows, dtype=compute_dtype, device="meta"), requires_grad=False) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:  # [n, in_features] -> [n, sum(parts)]
        return linear(x, self.weight, self.bias)
