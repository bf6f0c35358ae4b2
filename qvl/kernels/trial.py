"""A paged attention tried out before it is trusted: a small step of two decodes and a chunk behind a prefix.

Knows what a step looks like and what torch's operations make of it. Does not know which implementation it tries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvl.kernels.gpu import compiling_together
from qvl.kernels.sdpa import GatherAttention
from qvl.layers.attention import AttentionMetadata, Heads, PagedAttention

WRONG = 3e-2  # relative error; bfloat16 leaves a few thousandths


def problem_of(attention: PagedAttention, heads: Heads, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with it, or None; also compiles its kernels, all at the same time."""
    block_size = 16
    query, context = [1, 1, 20], [150, 5, 50]
    table = torch.arange(30, dtype=torch.int32, device=device).view(3, 10).flip(1).contiguous()
    index = [torch.arange(c - n, c, device=device) for n, c in zip(query, context, strict=True)]
    slots = torch.cat([table[i][at // block_size] * block_size + at % block_size for i, at in enumerate(index)])
    lengths = torch.tensor(context, dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1, 2, 22], dtype=torch.int32, device=device)
    step = AttentionMetadata(starts, lengths, table, slots.long(), query, context, block_size, num_decodes=2)
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    qkv = numbers(22, (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim)
    half = torch.rand(22, 1, heads.head_dim // 2, generator=generator, device=device).repeat(1, 1, 2) * 6
    k, v = (numbers(30, block_size, heads.num_kv_heads, heads.head_dim) for _ in range(2))

    def run(way: PagedAttention) -> Tensor:
        # An implementation may turn qkv in place.
        return way.run(qkv.clone(), (half.cos(), half.sin()), (k.clone(), v.clone()), way.plan(step)).float()

    with compiling_together():
        run(attention)
    out, exact = run(attention), run(GatherAttention())
    error = float((out - exact).norm() / exact.norm())
    return None if error < WRONG else f"the attention kernel gave wrong numbers (relative error {error:.1e})"
