"""The register of paged attention implementations.

Knows which implementations exist and what each needs. Does not know layers. A new one is a file beside this and one
entry in `CANDIDATES`, before the universal one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qvl.kernels import cpu_attention
from qvl.kernels.sdpa import GatherAttention
from qvl.layers.attention import PagedAttention

Capability = tuple[int, int]
# A candidate answers (implementation, reason) or None when it cannot run there.
Candidate = Callable[[torch.device, torch.dtype, int, Capability | None], tuple[PagedAttention, str] | None]


def compiled_cpu(
    device: torch.device, dtype: torch.dtype, head_dim: int, capability: Capability | None
) -> tuple[PagedAttention, str] | None:
    """Compiled kernels on a CPU that has a compiler."""
    return cpu_attention.choose(head_dim) if device.type == "cpu" and dtype == torch.float32 else None


def universal(
    device: torch.device, dtype: torch.dtype, head_dim: int, capability: Capability | None
) -> tuple[PagedAttention, str] | None:
    """torch's own operations run everywhere."""
    return GatherAttention(), f"gather+sdpa: torch operations, the implementation for every device ({device.type})"


CANDIDATES: tuple[Candidate, ...] = (compiled_cpu, universal)


def choose_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, capability: Capability | None = None
) -> tuple[PagedAttention, str]:
    """The first implementation that runs on this device, and why it was chosen."""
    for candidate in CANDIDATES:
        chosen = candidate(device, dtype, head_dim, capability)
        if chosen is not None:
            return chosen
    raise AssertionError("the universal implementation declines nothing")


def capability_of(device: torch.device) -> Capability | None:
    """(major, minor) of a CUDA device, None elsewhere."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
