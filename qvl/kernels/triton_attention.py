"""Paged attention on a GPU in Triton: one kernel for decoding and prefill, and one that joins the parts of a context.

Work comes as items: some query tokens of one sequence against some of its keys. Decodes are cut into items on the
device, from lengths that only the device has to know, so that a step of decodes can be recorded in a CUDA graph once
and replayed with other lengths. Knows the block layout. Does not know layers or requests. Importing this file imports
Triton; `qvl.kernels.attention` does so only where there is a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels.gpu import Tiles, launch
from qvl.kernels.sdpa import PrefillChunk, attend_chunk, prefill_chunks
from qvl.kernels.triton_ops import rope_and_store
from qvl.layers.attention import AttentionMetadata, Heads

FIELDS = (
    8  # int32 of an item: sequence, first row of q, query tokens, context before them, first key, end, part, unused
)
COMMON_BATCH = 256  # steps of up to so many decodes are cut by one compilation
PER_MULTIPROCESSOR = 2  # programs of a decode that should be under way at a time
LOG2E = 1.4426950408889634


@dataclass(slots=True)
class DecodeCut:
    """The items of the decodes; part numbers [bounds[i], bounds[i + 1]) belong to sequence i."""

    items: Tensor  # int32 [batch + most, FIELDS]
    bounds: Tensor  # int32 [batch + 1]
    parts: tuple[Tensor, Tensor]  # fp32 [items, heads, head_dim] and [items, heads]


@dataclass(slots=True)
class Plan:
    """A step: its decodes, and its prefills as tiles, or as chunks for torch where Triton has no tensor cores."""

    metadata: AttentionMetadata
    decodes: DecodeCut | None
    tiles: Tensor | None  # int32 [tiles, FIELDS]
    chunks: list[PrefillChunk]


class TritonAttention:
    """head_dim a power of two from 16 to 256, queries and cache of one dtype."""

    name = "triton"
    graph_safe = True

    def __init__(self, heads: Heads, tiles: Tiles, multiprocessors: int) -> None:
        self.heads = heads
        self.tiles = tiles
        self.most = -(-PER_MULTIPROCESSOR * multiprocessors // heads.num_kv_heads)

    def plan(self, metadata: AttentionMetadata) -> Plan:
        """Nothing here waits for the device or looks at the length of a decode."""
        cut = self.cut(metadata.seq_lens, metadata.num_decodes) if metadata.num_decodes else None
        prefills = len(metadata.query_lens) > metadata.num_decodes
        if not self.tiles.tensor_cores:
            return Plan(metadata, cut, None, prefill_chunks(metadata) if prefills else [])
        return Plan(metadata, cut, self.prefill_tiles(metadata) if prefills else None, [])

    def run(self, qkv: Tensor, angles: tuple[Tensor, Tensor], kv: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        """As `qvl.layers.attention.PagedAttention.run`."""
        q = rope_and_store(qkv, *angles, plan.metadata.slot_mapping, kv, self.tiles.early)
        return self.attend(q, kv, plan)

    def attend(self, q: Tensor, kv: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        """Rotated q [n, heads, head_dim] against a cache that already holds this step: [n, heads * head_dim]."""
        out = torch.empty_like(q)
        table = plan.metadata.block_table
        if plan.decodes is not None:
            cut = plan.decodes
            self.attend_items(q, kv, table, cut.items, out, cut.parts, rows=self.tiles.decode_rows(self.heads.group))
            merge(cut, out, self.tiles.early)
        if plan.tiles is not None:
            self.attend_items(q, kv, table, plan.tiles, out, None, rows=self.tiles.rows)
        for chunk in plan.chunks:
            out[chunk.start : chunk.stop] = attend_chunk(q[chunk.start : chunk.stop], kv, chunk)
        return out.flatten(1)

    def cut(self, seq_lens: Tensor, batch: int) -> DecodeCut:
        """Contexts into items of about equal length: at most one more than `most` and one for each sequence."""
        count, heads = batch + self.most, self.heads
        device = seq_lens.device
        items = torch.empty((count, FIELDS), dtype=torch.int32, device=device)
        bounds = torch.empty(batch + 1, dtype=torch.int32, device=device)
        parts = torch.empty((count, heads.num_heads, heads.head_dim + 1), dtype=torch.float32, device=device)
        flat = parts.view(-1)
        split = count * heads.num_heads * heads.head_dim
        lanes = max(COMMON_BATCH, triton.next_power_of_2(batch))
        launch(
            _cut, (1,),
            seq_lens, items, bounds, batch, count, self.most, BATCH=lanes,
            ITEMS=triton.next_power_of_2(lanes + self.most), BLOCK=self.tiles.decode_block, FIELDS=FIELDS,
            EARLY=self.tiles.early, num_warps=4,
        )  # fmt: skip
        return DecodeCut(items, bounds, (flat[:split], flat[split:]))

    def prefill_tiles(self, metadata: AttentionMetadata) -> Tensor:
        """The tiles of all sequences behind the decodes, on the device."""
        tiles = torch.from_numpy(cut_prefills(metadata, self.tiles.rows // self.heads.group))
        device = metadata.block_table.device
        return tiles.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tiles

    def attend_items(
        self,
        q: Tensor,
        kv: tuple[Tensor, Tensor],
        table: Tensor,
        items: Tensor,
        out: Tensor,
        parts: tuple[Tensor, Tensor] | None,
        *,
        rows: int,
    ) -> None:
        """All items against the cache; with `parts`, those of a context in several go there and not to `out`."""
        heads, tiles = self.heads, self.tiles
        part, weight = parts or (out, out)
        decode = parts is not None
        launch(
            _attend, (len(items) * heads.num_kv_heads,),
            q, *kv, table, items, out, part, weight, table.stride(0), heads.head_dim**-0.5 * LOG2E,
            KH=heads.num_kv_heads, D=heads.head_dim, PAGE=kv[0].shape[1], GROUP=heads.group, ROWS=rows,
            BLOCK=tiles.decode_block if decode else tiles.block, FIELDS=FIELDS, PARTS=decode,
            EARLY=tiles.early and decode, num_warps=4 if decode else tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def cut_prefills(metadata: AttentionMetadata, tokens: int) -> npt.NDArray[np.int32]:
    """Items of at most `tokens` query tokens against all keys they may see; longest first, so that none runs last."""
    found = []
    row = metadata.num_decodes
    for seq in range(metadata.num_decodes, len(metadata.query_lens)):
        count = metadata.query_lens[seq]
        at = np.arange(0, count, tokens, dtype=np.int32)
        items = np.zeros((len(at), FIELDS), dtype=np.int32)
        size = np.minimum(tokens, count - at)
        context = metadata.context_lens[seq] - count + at
        items[:, 0], items[:, 1], items[:, 2], items[:, 3] = seq, row + at, size, context
        items[:, 5], items[:, 6] = context + size, -1
        found.append(items)
        row += count
    together = np.concatenate(found)
    return np.ascontiguousarray(together[np.argsort(-together[:, 5], kind="stable")])


def merge(cut: DecodeCut, out: Tensor, early: bool) -> None:
    """The parts of each sequence become one; a sequence of length 0 gets zeros."""
    heads, dim = out.shape[1:]
    launch(
        _merge,
        ((len(cut.bounds) - 1) * heads,),
        *cut.parts,
        cut.bounds,
        out,
        H=heads,
        D=dim,
        SPAN=16,
        EARLY=early,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["batch", "count", "most"])
def _cut(
    lens_ptr,  # int32 [batch]
    items_ptr,  # int32 [count, FIELDS]
    bounds_ptr,  # int32 [batch + 1]
    batch,
    count,
    most,
    BATCH: tl.constexpr,
    ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program. sum(ceil(length / size)) <= batch + sum(length) / size <= count, whatever the lengths are."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    seq = tl.arange(0, BATCH)
    here = seq < batch
    length = tl.load(lens_ptr + seq, mask=here, other=0)
    size = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(length, 0), most), BLOCK), 1) * BLOCK
    parts = tl.cdiv(length, size)
    end = tl.cumsum(parts, 0)
    start = end - parts
    tl.store(bounds_ptr + 1 + seq, end, mask=here)
    tl.store(bounds_ptr + seq, start, mask=seq == 0)
    for i in range(tl.max(parts, 0)):
        live = i < parts
        item = items_ptr + (start + i) * FIELDS
        tl.store(item, seq, mask=live)
        tl.store(item + 1, seq, mask=live)
        tl.store(item + 2, 1, mask=live)
        tl.store(item + 3, length - 1, mask=live)
        tl.store(item + 4, i * size, mask=live)
        tl.store(item + 5, tl.minimum((i + 1) * size, length), mask=live)
        tl.store(item + 6, tl.where(parts > 1, start + i, -1), mask=live)
    left = tl.arange(0, ITEMS)
    tl.store(items_ptr + left * FIELDS + 2, 0, mask=(left >= tl.sum(parts, 0)) & (left < count))


@triton.jit
def _attend(
    q_ptr,  # [n, KH * GROUP, D]
    k_ptr,  # [blocks, PAGE, KH, D]
    v_ptr,
    table_ptr,  # int32 [b, table_stride]
    items_ptr,  # int32 [items, FIELDS]
    out_ptr,  # [n, KH * GROUP, D]
    part_ptr,  # fp32 [items, KH * GROUP, D]
    weight_ptr,  # fp32 [items, KH * GROUP]: log2 of the sum of the exponentials
    table_stride,
    scale,
    KH: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: one item and the GROUP query heads of one KV head; row r is head r % GROUP of token r // GROUP."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    item = items_ptr + tl.program_id(0) // KH * FIELDS
    kv_head = tl.program_id(0) % KH
    tokens = tl.load(item + 2)
    if tokens == 0:
        return
    seq = tl.load(item)
    first_row = tl.load(item + 1)
    context = tl.load(item + 3)
    first = tl.load(item + 4)
    stop = tl.load(item + 5)
    part = tl.load(item + 6)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    token = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    live = token < tokens
    at = ((first_row + token).to(tl.int64) * (KH * GROUP) + head) * D
    q = tl.load(q_ptr + at[:, None] + dims[None, :], mask=live[:, None], other=0.0)
    last = context + token  # the last key that a row sees

    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for start in range(first, stop, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < stop
        page = tl.load(table_ptr + seq * table_stride + t // PAGE, mask=inside, other=0).to(tl.int64)
        where = ((page * PAGE + t % PAGE) * KH + kv_head)[:, None] * D + dims[None, :]
        k = tl.load(k_ptr + where, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + where, mask=inside[:, None], other=0.0)
        seen = inside[None, :] & (t[None, :] <= last[:, None])
        s = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -1e30)
        new = tl.maximum(best, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        fade = tl.exp2(best - new)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        best = new
    result = acc / total[:, None]

    whole = live & (part < 0)
    tl.store(out_ptr + at[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=whole[:, None])
    if PARTS:
        of_many = live & (part >= 0)
        slot = part.to(tl.int64) * (KH * GROUP) + head
        tl.store(part_ptr + slot[:, None] * D + dims[None, :], result, mask=of_many[:, None])
        tl.store(weight_ptr + slot, best + tl.log2(total), mask=of_many)


@triton.jit
def _merge(
    part_ptr,
    weight_ptr,
    bounds_ptr,
    out_ptr,
    H: tl.constexpr,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: one head of one sequence, SPAN parts at a time."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    seq = tl.program_id(0) // H
    head = tl.program_id(0) % H
    first = tl.load(bounds_ptr + seq)
    stop = tl.load(bounds_ptr + seq + 1)
    if stop - first == 1:
        return  # written whole
    span = tl.arange(0, SPAN)
    dims = tl.arange(0, D)
    best = -1e30
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for start in range(first, stop, SPAN):
        part = start + span
        live = part < stop
        at = part.to(tl.int64) * H + head
        weight = tl.load(weight_ptr + at, mask=live, other=-1e30)
        value = tl.load(part_ptr + at[:, None] * D + dims[None, :], mask=live[:, None], other=0.0)
        new = tl.maximum(best, tl.max(weight, 0))
        p = tl.where(live, tl.exp2(weight - new), 0.0)
        fade = tl.exp2(best - new)
        total = total * fade + tl.sum(p, 0)
        acc = acc * fade + tl.sum(value * p[:, None], 0)
        best = new
    out = acc / tl.maximum(total, 1e-30)
    tl.store(out_ptr + (seq.to(tl.int64) * H + head) * D + dims, out.to(out_ptr.dtype.element_ty))
