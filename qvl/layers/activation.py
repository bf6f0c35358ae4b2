"""Activations by their configuration names.

Knows functions of one tensor. Does not know weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

from qvl.kernels.fused import quick_gelu

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"quick_gelu": quick_gelu, "gelu": F.gelu, "silu": F.silu}
)
