"""Matrix products of activations with weights, whatever the two dtypes are.

Knows which product is fast on which processor. Does not know which layer asks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, in] times weight [out, in] transposed, plus bias [out]: [n, out] in the dtype of x."""
    if x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), bias)


def compute_dtype_for(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of activations beside weights of `dtype`: fp32 on a CPU, the weights' own elsewhere."""
    return torch.float32 if device.type == "cpu" else dtype
