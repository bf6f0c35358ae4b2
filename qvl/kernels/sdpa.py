"""Paged attention from torch's own operations: gather blocks, then scaled dot-product attention. Runs on every device.

Knows the block layout. Does not know layers or requests.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels.fused import split_and_rotate
from qvl.kernels.on_cpu.dense_attention import attention_dtype
from qvl.layers.attention import AttentionMetadata

# Decoding sequences are padded to the longest of a group; a group may hold at most this many times its own tokens.
MAX_PADDING = 1.5


@dataclass(slots=True)
class DecodeGroup:
    """Sequences with one query token each, attended in one padded batch."""

    rows: Tensor  # int64 [g], rows of this step's tokens
    slots: Tensor  # int64 [g * length], where the keys and values of each one's tokens lie
    length: int  # tokens of the longest
    mask: Tensor | None  # bool [g, 1, 1, length], None when nothing is padded


@dataclass
class PrefillChunk:
    """One sequence's chunk of `stop - start` query tokens at the end of `length` tokens of context."""

    start: int
    stop: int
    blocks: Tensor  # int64 [blocks]
    length: int

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """Bottom-right causal [chunk, length]: the last row sees everything. None when the chunk is the whole context.

        Made once for all layers, where torch attends; a compiled kernel needs none.
        """
        chunk = self.stop - self.start
        if chunk == self.length:
            return None
        if self.blocks.is_cuda:
            return causal_lower_right(chunk, self.length)
        last_seen = torch.arange(self.length - chunk, self.length, device=self.blocks.device)
        return torch.arange(self.length, device=self.blocks.device) <= last_seen[:, None]


@dataclass(slots=True)
class Plan:
    """The gathers of one step, and masks of its decodes."""

    slots: Tensor
    decodes: list[DecodeGroup]
    prefills: list[PrefillChunk]


class GatherAttention:
    """The implementation that works everywhere; faster ones for one device stand beside this file."""

    name = "gather+sdpa"
    graph_safe = False  # shapes follow the lengths
    takes_sums = False
    tile_tokens = 0

    def plan(self, metadata: AttentionMetadata) -> Plan:
        """Group the decoding sequences by length and build the masks."""
        table = metadata.block_table.long()
        decodes = [decode_group(metadata, table, rows) for rows in group_by_length(metadata)]
        return Plan(metadata.slot_mapping, decodes, prefill_chunks(metadata))

    def run(self, qkv: Tensor, angles: tuple[Tensor, Tensor], kv: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        """As `qvl.layers.attention.PagedAttention.run`."""
        q, k, v = split_and_rotate(qkv, angles, kv[0].shape[2:])
        for cache, new in zip(kv, (k, v), strict=True):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, plan.slots, new.to(cache.dtype))
        out = torch.empty_like(q)
        for group in plan.decodes:
            out[group.rows] = attend_decodes(q[group.rows], kv, group)
        for chunk in plan.prefills:
            out[chunk.start : chunk.stop] = attend_chunk(q[chunk.start : chunk.stop], kv, chunk)
        return out.flatten(1)


def group_by_length(metadata: AttentionMetadata) -> list[list[int]]:
    """Rows of the decoding sequences, longest first, in groups in which little is padded."""
    lengths = metadata.context_lens
    groups: list[list[int]] = []
    own = 0
    for row in sorted(range(metadata.num_decodes), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= MAX_PADDING * (own + lengths[row]):
            groups[-1].append(row)
            own += lengths[row]
        else:
            groups.append([row])
            own = lengths[row]
    return groups


def decode_group(metadata: AttentionMetadata, table: Tensor, rows: list[int]) -> DecodeGroup:
    """The gather and the mask of one group; `rows` are both sequence numbers and token rows.

    A shorter sequence is padded with its own last token: other blocks may hold what is not a number, and no mask takes
    that out of a sum.
    """
    length, size = metadata.context_lens[rows[0]], metadata.block_size
    index = torch.tensor(rows, device=table.device)
    lengths = metadata.seq_lens[index, None].long()
    tokens = torch.minimum(torch.arange(length, device=table.device), lengths - 1)  # [g, length]
    slots = (table[index].gather(1, tokens // size) * size + tokens % size).flatten()
    if all(metadata.context_lens[i] == length for i in rows):
        return DecodeGroup(index, slots, length, None)
    mask = torch.arange(length, device=table.device) < lengths
    return DecodeGroup(index, slots, length, mask[:, None, None])


def prefill_chunks(metadata: AttentionMetadata) -> list[PrefillChunk]:
    """The sequences behind the decoding ones."""
    table = metadata.block_table.long()
    chunks = []
    start = metadata.num_decodes
    for i in range(metadata.num_decodes, len(metadata.query_lens)):
        stop = start + metadata.query_lens[i]
        length = metadata.context_lens[i]
        chunks.append(PrefillChunk(start, stop, table[i, : -(-length // metadata.block_size)], length))
        start = stop
    return chunks


def causal_lower_right(chunk: int, length: int) -> Tensor:
    """The same mask without its memory: torch's GPU kernels know it by name."""
    from torch.nn.attention import bias  # on a CPU nobody needs to load it

    return bias.causal_lower_right(chunk, length)


def attend_decodes(q: Tensor, kv: tuple[Tensor, Tensor], group: DecodeGroup) -> Tensor:  # [g, heads, d] -> the same
    """The query heads of one KV head become the query axis: nothing is repeated, no causal mask is needed."""
    k, v = (
        cache.flatten(0, 1).index_select(0, group.slots).unflatten(0, (-1, group.length)).transpose(1, 2).to(q.dtype)
        for cache in kv
    )  # [g, kv_heads, length, d]
    grouped = q.unflatten(1, (k.shape[1], -1))
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=group.mask).flatten(1, 2)


def attend_chunk(q: Tensor, kv: tuple[Tensor, Tensor], chunk: PrefillChunk) -> Tensor:  # [m, heads, d] -> the same
    """One sequence's queries against its whole context; the result may have fewer bits than q."""
    dtype = attention_dtype(kv[0].dtype, q.dtype)
    q = q.to(dtype)
    k, v = (cache[chunk.blocks].flatten(0, 1)[: chunk.length].transpose(0, 1).to(dtype)[None] for cache in kv)
    if q.is_cuda:  # of torch's kernels, the one for older GPUs wants as many keys' heads as queries'
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=chunk.mask, is_causal=chunk.mask is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)
