"""Full attention inside each of many segments: the pictures of a step, which do not see each other.

Knows our kernels and torch's, and which of them is the fastest where. Does not know pictures.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels.fused import rotate
from qvl.kernels.gpu import HOPPER, Capability, capability_of, compiling_together, gpu_kernels, gpu_problem, tried_out
from qvl.kernels.on_cpu.dense_attention import DenseKernel, attention_dtype, dense_kernel

MANY = 4  # groups of equal segments, above which one launch over all is better than one each
WRONG = 2e-2  # relative error; bfloat16 leaves a few thousandths
SLOWER = "cuDNN's attention is used instead: a picture of a megapixel takes about a third longer"
SLOWER_LARGE = (
    "the kernel for small ones is used instead: attention in a picture of a megapixel takes about a third longer"
)


@dataclass(frozen=True, slots=True)
class Segments:
    """Consecutive segments as (first row, count, length) of neighbours of one length; and what a kernel that takes all
    of them at once needs, where there is one: tiles for ours, or borders for torch's.
    """

    groups: list[tuple[int, int, int]]
    tiles: Tensor | None  # int32 [tiles, 4]
    bounds: Tensor | None  # int32 [segments + 1]
    longest: int
    tile_rows: int = 0  # most query rows of a tile of ours
    compiled: DenseKernel | None = None  # what attends on a CPU instead of torch
    dtype: torch.dtype | None = None  # what torch attends in, where that is not the dtype of queries, keys and values

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        weights: torch.dtype | None = None,
    ) -> Segments:
        """For activations of `dtype` between `weights` (None: of the same)."""
        groups = []
        start = 0
        for length, same in itertools.groupby(lengths):
            count = len(list(same))
            groups.append((start, count, length))
            start += count * length
        numbers = weights or dtype
        compiled = dense_kernel(numbers, dtype, head_dim) if device.type == "cpu" else None
        tiles = bounds = None
        rows = 0
        if (kernel := segment_kernel(device, dtype, head_dim)) is not None:
            rows = kernel.rows_for(lengths)
            tiles = uploaded(kernel.tiles_of(lengths, rows), device)
        elif len(groups) > MANY and has_flash(dtype, capability_of(device)):
            bounds = uploaded(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32), device)
        return cls(groups, tiles, bounds, max(lengths), rows, compiled, attention_dtype(numbers, dtype))


def uploaded(numbers: npt.NDArray[np.int32], device: torch.device) -> Tensor:
    """On a GPU, without waiting for what it does."""
    return torch.from_numpy(numbers).pin_memory().to(device, non_blocking=True)


def segment_attention(qkv: Tensor, angles: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
    """[n, 3, heads, head_dim] -> [n, heads * head_dim], queries and keys turned by their angles first.

    qkv is overwritten, and may be where the result lies.
    """
    if segments.compiled is not None:
        return segments.compiled.attend_segments(qkv, angles, segments.groups)
    queries_and_keys = qkv[:, :2].flatten(1, 2)
    if segments.tiles is not None:
        heads, dim = qkv.shape[2:]
        kernel, operations = segment_kernel(qkv.device, qkv.dtype, dim), gpu_kernels()
        assert kernel is not None
        assert operations is not None
        turned = operations.rotate(queries_and_keys, *angles, scaled=heads, scale=scale_of(dim))
        assert turned.data_ptr() == qkv.data_ptr()
        out: Tensor = kernel.attend_segments(qkv, segments.tiles, segments.tile_rows)
        return out
    turned = rotate(queries_and_keys, *angles)
    q, k = turned.unflatten(1, (2, -1)).unbind(1)
    return attend_by_torch(q, k, qkv[:, 2], segments)


def scale_of(head_dim: int) -> float:
    """What makes the scores of queries powers of 2: our kernels get queries times it, so that they are rounded once."""
    return math.log2(math.e) * head_dim**-0.5


def attend_by_torch(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
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
        batch = [x[rows].to(segments.dtype or x.dtype).unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)]
        attended = F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1).flatten(1)
        outputs.append(attended.to(q.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@functools.cache
def segment_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> ModuleType | None:
    """`qvl.kernels.on_gpu.attention_pictures`, or `attention_segments` alone, where they run, tried out once; warns
    when one should run and does not.
    """
    if capability_of(device) != HOPPER or dtype not in (torch.bfloat16, torch.float16) or gpu_problem() is not None:
        return None
    if halves(head_dim) is None:
        return None

    def trial(kernel: ModuleType) -> str | None:
        return problem_of(kernel, device, dtype, head_dim)

    large = tried_out("attention_pictures", "the kernel for attention in large pictures", trial, SLOWER_LARGE)
    return large or tried_out("attention_segments", "the kernel for attention in pictures", trial, SLOWER)


def halves(head_dim: int) -> tuple[int, int] | None:
    """The two powers of two that make head_dim, or None where two are not enough or one is too small or large."""
    low = 1 << (head_dim.bit_length() - 1)
    high = head_dim - low
    return (low, high) if high >= 16 and high & (high - 1) == 0 and head_dim <= 96 else None


def problem_of(kernel: ModuleType, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What is wrong with it, or None: segments of more than one turn of keys, of less than one, and of a single key;
    and scores of the first keys far above those of the last, where the kernel begins. Compiles its forms together.
    """
    lengths, heads = [300, 5, 1, 128], 2
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator, dtype=dtype, device=device)
    qkv[:, 0] *= scale_of(head_dim)
    qkv[:8, 1] *= 100
    alone = []
    for part in qkv.float().split(lengths):
        q, k, v = part.permute(1, 2, 0, 3)[:, None]
        one = F.scaled_dot_product_attention(q, k, v, scale=math.log(2))
        alone.append(one.squeeze(0).transpose(0, 1).flatten(1))
    exact = torch.cat(alone)
    tiles = {rows: uploaded(kernel.tiles_of(lengths, rows), device) for rows in kernel.FORMS}
    with compiling_together():
        for rows in tiles:
            kernel.attend_segments(qkv, tiles[rows], rows)
    for rows in tiles:
        out = kernel.attend_segments(qkv.clone(), tiles[rows], rows)
        error = float((out.float() - exact).norm() / exact.norm())
        if not error <= WRONG:
            return f"the kernel for attention in pictures is wrong by {error:.1%}"
    return None


def has_flash(dtype: torch.dtype, capability: Capability | None) -> bool:
    """Where torch brings FlashAttention-2."""
    return capability is not None and capability >= (8, 0) and dtype != torch.float32


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


def describe_segments(
    dtype: torch.dtype, device: torch.device, head_dim: int, weights: torch.dtype | None = None
) -> str:
    """What attends inside pictures there, for the operator; makes the choice (and builds the kernel) if need be."""
    if device.type != "cuda":
        ours = device.type == "cpu" and dense_kernel(weights or dtype, dtype, head_dim) is not None
        return "compiled kernel (bf16, fp32 sums)" if ours else "torch SDPA"
    if (kernel := segment_kernel(device, dtype, head_dim)) is not None:
        return str(kernel.NAME)
    return describe_torch(dtype, capability_of(device))


def describe_torch(dtype: torch.dtype, capability: Capability | None) -> str:
    """Which of torch's kernels attends inside pictures."""
    if prefers_cudnn(dtype, capability):
        return "cuDNN attention, FlashAttention-2 for many sizes at once"
    if has_flash(dtype, capability):
        return "FlashAttention-2 (torch)"
    return "torch SDPA (memory-efficient kernel: FlashAttention needs compute capability 8.0 and 16 bits)"
