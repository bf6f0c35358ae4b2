"""Paged attention on a GPU in Triton: how a step's decodes and prompts go to the kernels for them.

Knows what a step is. Does not know layers or requests. Importing this file imports Triton; `qvl.kernels.attention`
does so only where there is a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qvl.kernels.gpu import Tiles
from qvl.kernels.on_gpu.attention_cut import Cut, cut_decodes, most_items
from qvl.kernels.on_gpu.attention_decode import attend_decodes
from qvl.kernels.on_gpu.attention_prefill import attend_prefills
from qvl.kernels.on_gpu.ops import rope_and_store
from qvl.kernels.sdpa import PrefillChunk, attend_chunk, prefill_chunks
from qvl.kernels.sums import Sums
from qvl.layers.attention import AttentionMetadata, Heads, cut_prompts


class PromptKernel(Protocol):
    """`attention_prompts`, as it is used; a test may put something else there."""

    ROWS: int

    def takes(self, block_size: int, longest: int) -> bool: ...

    def attend_prompts(
        self, q: Tensor, kv: tuple[Tensor, Tensor], table: Tensor, work: Tensor, out: Tensor, heads: Heads
    ) -> None: ...


@dataclass(slots=True)
class Plan:
    """A step: its decodes, and its prefills as tiles, or as chunks for torch where Triton has no tensor cores."""

    metadata: AttentionMetadata
    decodes: Cut | None
    prefills: Tensor | None  # int32 [tiles, TILE_FIELDS]
    chunks: list[PrefillChunk]
    long: PromptKernel | None = None  # what takes the tiles, if not the kernel for every GPU


class TritonAttention:
    """head_dim a power of two from 16 to 256, queries and cache of one dtype.

    `prompts` is a kernel for long ones, where there is one. Recorded steps never take it: they are short.
    """

    name = "triton"
    graph_safe = True
    takes_sums = True

    def __init__(self, heads: Heads, tiles: Tiles, multiprocessors: int, prompts: PromptKernel | None = None) -> None:
        self.heads = heads
        self.tiles = tiles
        self.prompts = prompts
        self.tile_tokens = tiles.rows // heads.group if tiles.tensor_cores else 0
        self.multiprocessors = multiprocessors

    def plan(self, metadata: AttentionMetadata) -> Plan:
        """Nothing here waits for the device or looks at the length of a decode."""
        plan = Plan(metadata, None, None, [])
        if metadata.num_decodes:
            plan.decodes = self.cut(metadata.seq_lens, metadata.num_decodes)
        if metadata.prompt_tiles is not None:
            plan.prefills = metadata.prompt_tiles
        elif len(metadata.query_lens) == metadata.num_decodes:
            return plan
        elif self.tile_tokens:
            plan.long = self.takes_long(metadata)
            tokens = self.tile_tokens if plan.long is None else plan.long.ROWS // self.heads.group
            lengths = metadata.query_lens, metadata.context_lens
            work = torch.from_numpy(cut_prompts(*lengths, metadata.num_decodes, tokens))
            device = metadata.block_table.device
            plan.prefills = work.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else work
        else:
            plan.chunks = prefill_chunks(metadata)
        return plan

    def takes_long(self, metadata: AttentionMetadata) -> PromptKernel | None:
        """The kernel for long prompts, if it takes those of this step."""
        longest = max(metadata.context_lens[metadata.num_decodes :])
        takes = self.prompts is not None and self.prompts.takes(metadata.block_size, longest)
        return self.prompts if takes else None

    def cut(self, seq_lens: Tensor, batch: int) -> Cut:
        """The first `batch` contexts as items that fill this GPU."""
        most = most_items(batch, self.multiprocessors, self.heads.num_kv_heads)
        return cut_decodes(seq_lens, batch, most, self.heads, self.tiles)

    def run(self, qkv: Tensor | Sums, angles: tuple[Tensor, Tensor], kv: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        """As `qvl.layers.attention.PagedAttention.run`."""
        q = rope_and_store(qkv, *angles, plan.metadata.slot_mapping, kv, self.tiles.early)
        return self.attend(q, kv, plan)

    def attend(self, q: Tensor, kv: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        """Rotated q [n, heads, head_dim] against a cache that already holds this step: [n, heads * head_dim]."""
        out = torch.empty_like(q)
        table = plan.metadata.block_table
        if plan.prefills is not None:
            if plan.long is None:
                attend_prefills(q, kv, table, plan.prefills, out, self.heads, self.tiles)
            else:
                plan.long.attend_prompts(q, kv, table, plan.prefills, out, self.heads)
        if plan.decodes is not None:  # behind the prompts: those end with few programs, which leave room for these
            beside = plan.prefills is not None
            attend_decodes(q, kv, table, plan.decodes, out, self.heads, self.tiles, beside)
        for chunk in plan.chunks:
            out[chunk.start : chunk.stop] = attend_chunk(q[chunk.start : chunk.stop], kv, chunk)
        return out.flatten(1)
