"""A paged attention tried out before it is trusted: a small step of two decodes and a chunk behind a prefix.

Knows what a step looks like and what torch's operations make of it. Does not know which implementation it tries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvl.kernels.gpu import compiling_together
from qvl.kernels.sdpa import GatherAttention
from qvl.layers.attention import AttentionMetadata, Heads, PagedAttention

BLOCK_SIZE = 16
WRONG = 3e-2  # relative error; bfloat16 leaves a few thousandths


def problem_of(attention: PagedAttention, heads: Heads, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with it, or None; also compiles its kernels, all at the same time.

    What is right is computed on the CPU: a GPU would load dozens of torch's kernels for it, which takes seconds.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    qkv = numbers(22, (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim)
    half = torch.rand(22, 1, heads.head_dim // 2, generator=generator).repeat(1, 1, 2) * 6
    k, v = (numbers(30, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim) for _ in range(2))

    def run(way: PagedAttention, place: torch.device, wide: torch.dtype) -> Tensor:
        # An implementation may turn qkv in place.
        angles = half.cos().to(place), half.sin().to(place)
        mine, keys, values = (x.to(place, wide, copy=True) for x in (qkv, k, v))
        return way.run(mine, angles, (keys, values), way.plan(step_on(place))).cpu().float()

    with compiling_together():
        run(attention, device, dtype)
    out = run(attention, device, dtype)
    exact = run(GatherAttention(), torch.device("cpu"), torch.float32)
    error = float((out - exact).norm() / exact.norm())
    return None if error < WRONG else f"the attention kernel gave wrong numbers (relative error {error:.1e})"


def step_on(device: torch.device) -> AttentionMetadata:
    """Two decodes with 150 and 5 tokens, and 20 tokens behind 30."""
    query, context = [1, 1, 20], [150, 5, 50]
    table = torch.arange(30, dtype=torch.int32).view(3, 10).flip(1).contiguous()
    index = [torch.arange(c - n, c) for n, c in zip(query, context, strict=True)]
    slots = torch.cat([table[i][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for i, at in enumerate(index)])
    lengths = torch.tensor(context, dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 22], dtype=torch.int32)
    starts, lengths, table, slots = (x.to(device) for x in (starts, lengths, table, slots.long()))
    return AttentionMetadata(starts, lengths, table, slots, query, context, BLOCK_SIZE, num_decodes=2)
