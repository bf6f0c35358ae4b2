"""The register of paged attention implementations.

Knows which implementations exist and what each needs. Does not know layers. A new one is a file beside this and one
entry in `CANDIDATES`, before the universal one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qvl.kernels.sdpa import GatherAttention
from qvl.layers.attention import PagedAttention

Capability = tuple[int, int]
# A candidate answers (implementation, reason) or None when it cannot run there.
Candidate = Callable[[torch.device, torch.dtype, Capability | None], tuple[PagedAttention, str] | None]


def universal(
    device: torch.device, dtype: torch.dtype, capability: Capability | None
) -> tuple[PagedAttention, str] | None:
    """torch's own operations run everywhere."""
    return GatherAttention(), f"gather+sdpa: torch operations, the implementation for every device ({device.type})"


CANDIDATES: tuple[Candidate, ...] = (universal,)


def choose_attention(
    device: torch.device, dtype: torch.dtype, capability: Capability | None = None
) -> tuple[PagedAttention, str]:
    """The first implementation that runs on this device, and why it was chosen."""
    for candidate in CANDIDATES:
        chosen = candidate(device, dtype, capability)
        if chosen is not None:
            return chosen
    raise AssertionError("the universal implementation declines nothing")
