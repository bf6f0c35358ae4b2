"""Paged attention on a GPU: split-KV decoding and tiled causal prefill in Triton, each one launch a layer.

Knows the block layout and how a step's work is cut into programs. Does not know layers or requests. Importing this
file imports Triton; `qvl.kernels.attention` does so only where there is a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl.layers.attention import AttentionMetadata

DECODE_BLOCK = 64  # keys that one turn of the decoding loop reads
PREFILL_ROWS = 64  # query tokens of one tile
PREFILL_BLOCK = 64
MIN_SPLIT = 128  # a split of fewer keys costs more to merge than it saves
MAX_SPLITS = 64
LOG2E = 1.4426950408889634


@dataclass(slots=True)
class Plan:
    """The step, the cut of its decoding contexts, and the tiles of its prefill chunks (int32 [tiles, 4])."""

    metadata: AttentionMetadata
    splits: int
    tiles: Tensor | None


class TritonAttention:
    """16-bit or fp32 tensors; head_dim a power of two from 16 to 256."""

    name = "triton"

    def __init__(self, multiprocessors: int) -> None:
        self.multiprocessors = multiprocessors

    def plan(self, metadata: AttentionMetadata) -> Plan:
        """How far to split the decodes, and where the tiles of the prefill chunks lie."""
        count = metadata.num_decodes
        longest = max(metadata.context_lens[:count], default=0)
        tiles = prefill_tiles(metadata)
        device = metadata.block_table.device
        on_device = torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True) if tiles else None
        return Plan(metadata, num_splits(count, longest, self.multiprocessors), on_device)

    def run(self, q: Tensor, k: Tensor, v: Tensor, kv: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        """As `qvl.layers.attention.PagedAttention.run`."""
        for cache, new in zip(kv, (k, v), strict=True):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, plan.metadata.slot_mapping, new.to(cache.dtype))
        q = q.contiguous()
        out = torch.empty_like(q)
        table = plan.metadata.block_table
        if plan.metadata.num_decodes:
            decode(q, kv, table, plan.metadata.seq_lens, out, plan.metadata.num_decodes, plan.splits)
        if plan.tiles is not None:
            prefill(q, kv, table, plan.tiles, out)
        return out.flatten(1)


def num_splits(batch: int, longest: int, multiprocessors: int) -> int:
    """A power of two that gives every multiprocessor work, with at least MIN_SPLIT keys a split."""
    splits = 1
    while splits < MAX_SPLITS and batch * splits < multiprocessors and longest > MIN_SPLIT * splits:
        splits *= 2
    return splits


def prefill_tiles(metadata: AttentionMetadata) -> list[tuple[int, int, int, int]]:
    """(sequence, first row, rows, context before it) of every tile; longest first, so that none runs last."""
    tiles = []
    row = metadata.num_decodes
    for seq in range(metadata.num_decodes, len(metadata.query_lens)):
        count = metadata.query_lens[seq]
        before = metadata.context_lens[seq] - count
        tiles += [(seq, row + at, min(PREFILL_ROWS, count - at), before + at) for at in range(0, count, PREFILL_ROWS)]
        row += count
    return sorted(tiles, key=lambda tile: -(tile[2] + tile[3]))


def decode(
    q: Tensor, kv: tuple[Tensor, Tensor], table: Tensor, seq_lens: Tensor, out: Tensor, batch: int, splits: int
) -> None:
    """The first `batch` rows of q [n, heads, head_dim] against their sequences, into the same rows of out."""
    k, v = kv
    page, kv_heads, dim = k.shape[1:]
    heads = q.shape[1]
    part, lse = out, out
    if splits > 1:
        part = torch.empty((batch, heads, splits, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    group = heads // kv_heads
    _decode[(batch, kv_heads, splits)](
        q, k, v, table, seq_lens, out, part, lse, table.stride(0), dim**-0.5 * LOG2E,
        H=heads, KH=kv_heads, D=dim, PAGE=page, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)),
        BLOCK=DECODE_BLOCK, SPLITS=splits, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _merge[(batch * heads,)](part, lse, out, D=dim, SPLITS=splits, num_warps=4)


def prefill(q: Tensor, kv: tuple[Tensor, Tensor], table: Tensor, tiles: Tensor, out: Tensor) -> None:
    """The rows of q that `tiles` name against everything before and in their chunk."""
    k, v = kv
    page, kv_heads, dim = k.shape[1:]
    heads = q.shape[1]
    _prefill[(len(tiles), heads)](
        q, k, v, table, tiles, out, table.stride(0), dim**-0.5 * LOG2E,
        H=heads, KH=kv_heads, D=dim, PAGE=page, GROUP=heads // kv_heads, ROWS=PREFILL_ROWS, BLOCK=PREFILL_BLOCK,
        num_warps=4, num_stages=2,
    )  # fmt: skip


@triton.jit
def _decode(
    q_ptr,  # [n, H, D]
    k_ptr,  # [blocks, PAGE, KH, D]
    v_ptr,
    table_ptr,  # int32 [b, table_stride]
    lens_ptr,  # int32 [b]
    out_ptr,  # [n, H, D]
    part_ptr,  # fp32 [b, H, SPLITS, D] when SPLITS > 1
    lse_ptr,  # fp32 [b, H, SPLITS]: log2 of the sum of the weights
    table_stride,
    scale,
    H: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program: the query heads of one KV head of one sequence, one split of its context."""
    seq = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lens_ptr + seq)
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    start = split * per_split
    stop = tl.minimum(start + per_split, length)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    head = kv_head * GROUP + rows
    live = rows < GROUP
    at = seq * H + head
    q = tl.load(q_ptr + at[:, None] * D + dims[None, :], mask=live[:, None], other=0.0)

    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for first in range(start, stop, BLOCK):
        t = first + tl.arange(0, BLOCK)
        seen = t < stop
        page = tl.load(table_ptr + seq * table_stride + t // PAGE, mask=seen, other=0).to(tl.int64)
        row = ((page * PAGE + t % PAGE) * KH + kv_head) * D
        k = tl.load(k_ptr + row[None, :] + dims[:, None], mask=seen[None, :], other=0.0)
        s = tl.where(seen[None, :], tl.dot(q, k, input_precision="ieee") * scale, -1e30)
        new = tl.maximum(best, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        fade = tl.exp2(best - new)
        total = total * fade + tl.sum(p, 1)
        v = tl.load(v_ptr + row[:, None] + dims[None, :], mask=seen[:, None], other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        best = new

    # An empty split (or a padded row of length 0) has no weight; dividing by 1 keeps it finite.
    sums = tl.where(total > 0, total, 1.0)
    result = acc / sums[:, None]
    if SPLITS == 1:
        tl.store(out_ptr + at[:, None] * D + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=live[:, None])
    else:
        slot = at * SPLITS + split
        tl.store(part_ptr + slot[:, None] * D + dims[None, :], result, mask=live[:, None])
        tl.store(lse_ptr + slot, tl.where(total > 0, best + tl.log2(sums), -1e30), mask=live)


@triton.jit
def _merge(part_ptr, lse_ptr, out_ptr, D: tl.constexpr, SPLITS: tl.constexpr):
    """One program: the splits of one head of one sequence, weighted by their sums."""
    at = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, D)
    lse = tl.load(lse_ptr + at * SPLITS + splits)
    weight = tl.exp2(lse - tl.max(lse, 0))
    part = tl.load(part_ptr + (at * SPLITS + splits)[:, None] * D + dims[None, :])
    out = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + at * D + dims, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _prefill(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    tile_ptr,  # int32 [tiles, 4]: sequence, first row of q, rows, context before that row
    out_ptr,
    table_stride,
    scale,
    H: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one head of one tile of query tokens."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // GROUP
    seq = tl.load(tile_ptr + tile * 4)
    first_row = tl.load(tile_ptr + tile * 4 + 1)
    num_rows = tl.load(tile_ptr + tile * 4 + 2)
    context = tl.load(tile_ptr + tile * 4 + 3)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    live = rows < num_rows
    at = ((first_row + rows).to(tl.int64) * H + head) * D
    q = tl.load(q_ptr + at[:, None] + dims[None, :], mask=live[:, None], other=0.0)
    last_seen = context + rows

    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    stop = context + num_rows
    for first in range(0, stop, BLOCK):
        t = first + tl.arange(0, BLOCK)
        seen = t < stop
        page = tl.load(table_ptr + seq * table_stride + t // PAGE, mask=seen, other=0).to(tl.int64)
        row = ((page * PAGE + t % PAGE) * KH + kv_head) * D
        k = tl.load(k_ptr + row[None, :] + dims[:, None], mask=seen[None, :], other=0.0)
        visible = t[None, :] <= last_seen[:, None]
        s = tl.where(visible, tl.dot(q, k, input_precision="ieee") * scale, -1e30)
        new = tl.maximum(best, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        fade = tl.exp2(best - new)
        total = total * fade + tl.sum(p, 1)
        v = tl.load(v_ptr + row[:, None] + dims[None, :], mask=seen[:, None], other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        best = new
    out = acc / total[:, None]
    tl.store(out_ptr + at[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=live[:, None])
