"""The product of activations with weights, whatever device and dtypes.

Knows which file of this package computes it. Does not know which layer asks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels.cpu_linear import choose_cpu_linear
from qvl.kernels.cpu_quantised import kernels


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, in] times weight [out, in] transposed, plus bias [out]: [n, out] in the dtype of x."""
    if weight.device.type == "cpu":
        return choose_cpu_linear(weight.dtype)(x, weight, bias)
    return F.linear(x, weight, bias)


def compute_dtype_for(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of activations beside weights of `dtype`: fp32 on a CPU, the weights' own elsewhere."""
    return torch.float32 if device.type == "cpu" else dtype


def describe_linear(dtype: torch.dtype, device: torch.device, quantization: str = "none") -> str:
    """How products are computed there, in words; on a CPU this makes the choice (and builds the kernel) if need be."""
    if device.type != "cpu":
        return f"torch {dtype}"
    plain = choose_cpu_linear(dtype).reason
    return plain if quantization == "none" else f"{quantization}: {kernels().reason}; the rest: {plain}"
