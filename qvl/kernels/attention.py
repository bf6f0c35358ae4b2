"""The register of paged attention implementations.

Knows which implementations exist and what each needs. Does not know layers. A new one is a file beside this and one
entry in `CANDIDATES`, before the universal one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qvl.kernels import cpu_attention
from qvl.kernels.gpu import gpu_problem
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


def triton_gpu(
    device: torch.device, dtype: torch.dtype, head_dim: int, capability: Capability | None
) -> tuple[PagedAttention, str] | None:
    """Triton kernels on a GPU; tl.dot needs a power of two, and compute capability 8.0 for bfloat16."""
    if device.type != "cuda" or head_dim not in (16, 32, 64, 128, 256) or gpu_problem() is not None:
        return None
    if capability is None or capability < ((8, 0) if dtype == torch.bfloat16 else (7, 5)):
        return None
    from qvl.kernels.triton_attention import TritonAttention

    count = torch.cuda.get_device_properties(device).multi_processor_count
    return TritonAttention(count), f"triton: paged prefill and split-KV decoding on sm_{capability[0]}{capability[1]}"


def universal(
    device: torch.device, dtype: torch.dtype, head_dim: int, capability: Capability | None
) -> tuple[PagedAttention, str] | None:
    """torch's own operations run everywhere."""
    return GatherAttention(), f"gather+sdpa: torch operations, the implementation for every device ({device.type})"


CANDIDATES: tuple[Candidate, ...] = (compiled_cpu, triton_gpu, universal)


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
