"""A paged attention tried out before it is trusted: small steps of decodes and of parts of prompts.

Knows what a step looks like and what torch's operations make of it. Does not know which implementation it tries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvl.kernels.gpu import compiling_together
from qvl.kernels.sdpa import GatherAttention
from qvl.layers.attention import AttentionMetadata, Heads, PagedAttention

BLOCK_SIZE = 16
STEPS = (
    ([1, 1, 20], [150, 5, 50]),  # two decodes, and a chunk of a prompt behind its beginning
    ([40], [1100]),  # the end of a long prompt: some tiles, against many turns of keys
)
WRONG = 3e-2  # relative error; bfloat16 leaves a few thousandths


def problem_of(attention: PagedAttention, heads: Heads, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with it, or None; also compiles its kernels, all at the same time."""
    trials = [Trial(*step, heads, dtype) for step in STEPS]
    with compiling_together():
        for trial in trials:
            trial.run(attention, device, dtype)
    for trial in trials:
        out = trial.run(attention, device, dtype)
        # On the CPU: a GPU would load dozens of torch's kernels for it, which takes seconds.
        exact = trial.run(GatherAttention(), torch.device("cpu"), torch.float32)
        error = float((out - exact).norm() / exact.norm())
        if not error < WRONG:
            return f"the attention kernel gave wrong numbers (relative error {error:.1e})"
    return None


class Trial:
    """One step and its numbers, on the host."""

    def __init__(self, query: list[int], context: list[int], heads: Heads, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        self.query, self.context = query, context
        self.qkv = numbers(sum(query), (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim)
        self.half = torch.rand(sum(query), 1, heads.head_dim // 2, generator=generator).repeat(1, 1, 2) * 6
        self.blocks = -(-max(context) // BLOCK_SIZE)  # of each sequence
        shape = len(query) * self.blocks, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim
        self.cache = numbers(*shape), numbers(*shape)

    def run(self, way: PagedAttention, device: torch.device, dtype: torch.dtype) -> Tensor:
        """What an implementation makes of it there: fp32 on the host."""
        angles = self.half.cos().to(device), self.half.sin().to(device)
        # An implementation may turn qkv in place.
        qkv, k, v = (x.to(device, dtype, copy=True) for x in (self.qkv, *self.cache))
        return way.run(qkv, angles, (k, v), way.plan(self.step_on(device))).cpu().float()

    def step_on(self, device: torch.device) -> AttentionMetadata:
        """Blocks of a sequence lie backwards in the cache, and its last one is not full."""
        query, context = self.query, self.context
        table = torch.arange(len(query) * self.blocks, dtype=torch.int32).view(-1, self.blocks).flip(1).contiguous()
        index = [torch.arange(c - n, c) for n, c in zip(query, context, strict=True)]
        slots = torch.cat([table[i][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for i, at in enumerate(index)])
        lengths = torch.tensor(context, dtype=torch.int32)
        lengths, table, slots = (x.to(device) for x in (lengths, table, slots.long()))
        return AttentionMetadata(lengths, table, slots, query, context, BLOCK_SIZE, num_decodes=query.count(1))
