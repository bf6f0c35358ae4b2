"""Paged attention on a CPU: compiled kernels store and decode; in prefill one attends, or torch.

Knows the block layout and the compiled library. Does not know layers or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvl.kernels.fused import cpu_kernels, split_and_rotate
from qvl.kernels.on_cpu.dense_attention import dense_kernel
from qvl.kernels.on_cpu.matrix_registers import has_matrix_registers
from qvl.kernels.sdpa import PrefillChunk, attend_chunk, prefill_chunks
from qvl.layers.attention import AttentionMetadata, PagedAttention

SPLIT = 256  # as in ops.c
MAX_DIM = 512
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@dataclass(slots=True)
class Plan:
    """The step, with the prefill chunks' gathers; `table` and `lengths` are int32 and contiguous."""

    slots: Tensor
    table: Tensor
    lengths: Tensor
    num_decodes: int
    block_size: int
    splits: int
    prefills: list[PrefillChunk]


class CpuAttention:
    """fp32 activations, a cache in any of `TYPES`."""

    name = "cpu"
    graph_safe = False
    takes_sums = False
    tile_tokens = 0

    def __init__(self, library: Any) -> None:
        self.library = library

    def plan(self, metadata: AttentionMetadata) -> Plan:
        """Decoding needs only the block table; long contexts are split between threads."""
        longest = max(metadata.context_lens[: metadata.num_decodes], default=0)
        return Plan(
            metadata.slot_mapping.contiguous(),
            metadata.block_table.int().contiguous(),
            metadata.seq_lens.int().contiguous(),
            metadata.num_decodes,
            metadata.block_size,
            -(-longest // SPLIT),
            prefill_chunks(metadata),
        )

    def run(self, qkv: Tensor, angles: tuple[Tensor, Tensor], kv: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        """As `qvl.layers.attention.PagedAttention.run`."""
        q, k, v = split_and_rotate(qkv, angles, kv[0].shape[2:])
        self.store(k, kv[0], plan)
        self.store(v, kv[1], plan)
        q = q.contiguous()
        out = torch.empty_like(q)
        if plan.num_decodes:
            self.decode(q, kv, plan, out)
        dense = dense_kernel(kv[0].dtype, q.dtype, q.shape[2])
        for chunk in plan.prefills:
            rows = slice(chunk.start, chunk.stop)
            if dense is None:
                out[rows] = attend_chunk(q[rows], kv, chunk)
            else:
                dense.attend_prompt(q[rows], kv, chunk.blocks, chunk.length, out[rows])
        return out.flatten(1)

    def store(self, new: Tensor, cache: Tensor, plan: Plan) -> None:
        """Rows of new [n, kv_heads, head_dim] into their slots."""
        width = new.shape[1] * new.shape[2]
        if new.stride(2) != 1 or new.stride(1) != new.shape[2]:
            new = new.contiguous()
        self.library.qvl_store(
            new.data_ptr(), new.stride(0), cache.data_ptr(), plan.slots.data_ptr(), new.shape[0], width,
            TYPES[cache.dtype], torch.get_num_threads(),
        )  # fmt: skip

    def decode(self, q: Tensor, kv: tuple[Tensor, Tensor], plan: Plan, out: Tensor) -> None:
        """The first num_decodes rows of q against their sequences, into the same rows of out."""
        heads, dim = q.shape[1:]
        scratch = torch.empty(plan.num_decodes * heads * plan.splits * (dim + 2))
        self.library.qvl_decode_attention(
            q.data_ptr(), kv[0].data_ptr(), kv[1].data_ptr(), plan.table.data_ptr(), plan.table.stride(0),
            plan.lengths.data_ptr(), out.data_ptr(), scratch.data_ptr(), plan.num_decodes, heads, kv[0].shape[2], dim,
            plan.block_size, plan.splits, dim**-0.5, TYPES[kv[0].dtype], torch.get_num_threads(),
        )  # fmt: skip


def choose(head_dim: int) -> tuple[PagedAttention, str] | None:
    """The compiled attention when it was built and `head_dim` fills its vectors."""
    library = cpu_kernels()
    if library is None or head_dim % library.qvl_lanes() or head_dim > MAX_DIM:
        return None
    ours = dense_kernel(torch.bfloat16, torch.float32, head_dim) is not None
    prefill = "compiled prefill in bf16 if the cache is" if ours else "torch SDPA for prefill"
    if has_matrix_registers():
        prefill += " in bf16 if the cache is"
    reason = f"cpu: compiled paged decoding ({library.qvl_lanes()} floats a vector), {prefill}"
    return CpuAttention(library), reason
