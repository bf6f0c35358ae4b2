"""Activations by their configuration names, and the gated one of the text decoder.

Knows functions of one tensor. Does not know weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor


def quick_gelu(x: Tensor) -> Tensor:  # any shape
    """x * sigmoid(1.702 x), the GELU approximation of CLIP and of this family's vision tower."""
    return x * torch.sigmoid(1.702 * x)


def silu_and_mul(gate_up: Tensor) -> Tensor:  # [n, 2 * size] -> [n, size]
    """silu(first half) * second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"quick_gelu": quick_gelu, "gelu": F.gelu, "silu": F.silu}
)
