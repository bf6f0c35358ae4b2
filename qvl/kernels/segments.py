"""Full attention inside each of many segments: the pictures of a step, which do not see each other.

Knows torch's attention kernels, and which of them is the fastest where. Does not know pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels.gpu import Capability

MANY = 4  # groups of equal segments, above which one launch over all is better than one each


@dataclass(frozen=True, slots=True)
class Segments:
    """Consecutive segments as (first row, count, length) of neighbours of one length; and, where there are many such
    groups on a GPU, their borders for a kernel that takes them all.
    """

    groups: list[tuple[int, int, int]]
    bounds: Tensor | None  # int32 [segments + 1]
    longest: int

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device, dtype: torch.dtype, capability: Capability | None
    ) -> Segments:
        groups = []
        start = 0
        for length, same in itertools.groupby(lengths):
            count = len(list(same))
            groups.append((start, count, length))
            start += count * length
        bounds = None
        if len(groups) > MANY and capability is not None and capability >= (8, 0) and dtype != torch.float32:
            array = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
            bounds = torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
        return cls(groups, bounds, max(lengths))


def segment_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """q, k, v [n, heads, head_dim]: [n, heads * head_dim]."""
    if segments.bounds is not None:
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest = segments.bounds, segments.longest
        together = varlen_attn(q, k, v, bounds, bounds, longest, longest)
        assert isinstance(together, Tensor)
        return together.flatten(1)
    outputs = []
    for start, count, length in segments.groups:
        rows = slice(start, start + count * length)
        batch = [x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)]
        outputs.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1).flatten(1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def prefers_cudnn(dtype: torch.dtype, capability: Capability | None) -> bool:
    """Where cuDNN's kernel is the faster one: a third less time than FlashAttention-2 on an H200 (head_dim 80)."""
    return capability is not None and (9, 0) <= capability < (12, 0) and dtype != torch.float32


def preferred_order(dtype: torch.dtype, capability: Capability | None) -> AbstractContextManager[None]:
    """Inside it, torch takes the fastest of its kernels first."""
    if not prefers_cudnn(dtype, capability):
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    order: AbstractContextManager[None] = sdpa_kernel(kernels, set_priority=True)
    return order


def describe_segments(dtype: torch.dtype, device: torch.device, capability: Capability | None) -> str:
    """What attends inside pictures there, for the operator."""
    if device.type != "cuda":
        return "torch SDPA"
    if prefers_cudnn(dtype, capability):
        return "cuDNN attention, FlashAttention-2 for many sizes at once"
    if capability is not None and capability >= (8, 0) and dtype != torch.float32:
        return "FlashAttention-2 (torch)"
    return "torch SDPA (memory-efficient kernel: FlashAttention needs compute capability 8.0 and 16 bits)"
