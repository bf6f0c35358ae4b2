"""Attention of decodes over the paged cache, in Triton: contexts cut into items, and the parts of long ones joined.

The cut is made on the device, from lengths that only the device has to know, so that a step of decodes can be recorded
in a CUDA graph once and replayed with other lengths. Knows the block layout. Does not know how a step is planned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels.gpu import Tiles, cdiv, launch, next_power_of_2
from qvl.kernels.triton_prefill import LOG2E, attend_keys, blocks_of
from qvl.layers.attention import Heads

# int32 of an item: sequence, first key, end, how many items the sequence has; and of a join: sequence, its first item,
# unused, how many it has. None: there is no such item or join.
FIELDS = 4
ITEMS_EACH = 16  # that one program of the cut writes
COMMON_BATCH = 256  # steps of up to so many decodes are cut by one compilation
PER_MULTIPROCESSOR = 4  # programs that fit there at a time
LEAST = 64  # keys of an item: with fewer, joining costs more than reading
SPAN = 32  # parts that are joined at a time
# Sequences from which on the product behind a join is let in before the join has waited, and fetches weights meanwhile.
# The programs of the product for one row fill a multiprocessor: they come when there is room.
LET_IN_FROM = 2


@dataclass(slots=True)
class Cut:
    """The items of a step's decodes, and the sequences that have several."""

    items: Tensor  # int32 [batch + most, FIELDS]
    joins: Tensor  # int32 [min(batch, most), FIELDS]
    parts: Tensor  # fp32 [items, heads, head_dim]
    weights: Tensor  # fp32 [items, heads]: log2 of the sum of the exponentials


def most_items(batch: int, multiprocessors: int, kv_heads: int) -> int:
    """Into how many items of equal length a step is cut; rounding up adds at most one for each sequence.

    So many that they all run at a time, if every sequence adds a half; but enough that one long context among many
    short ones is cut too.
    """
    together = -(-PER_MULTIPROCESSOR * multiprocessors // kv_heads)
    return max(together - batch // 2, together // 2, 1)


def cut_decodes(seq_lens: Tensor, batch: int, most: int, heads: Heads, tiles: Tiles) -> Cut:
    """The first `batch` contexts as items of about equal length, the same for every layer of a step."""
    count, device = batch + most, seq_lens.device
    cut = Cut(
        torch.empty((count, FIELDS), dtype=torch.int32, device=device),
        torch.empty((min(batch, most), FIELDS), dtype=torch.int32, device=device),
        torch.empty((count, heads.num_heads, heads.head_dim), dtype=torch.float32, device=device),
        torch.empty((count, heads.num_heads), dtype=torch.float32, device=device),
    )
    launch(
        _cut, (cdiv(count, ITEMS_EACH),),
        seq_lens, cut.items, cut.joins, batch, count, most,
        BATCH=max(COMMON_BATCH, next_power_of_2(batch)), EACH=ITEMS_EACH, BLOCK=tiles.decode_block,
        LEAST=max(LEAST, tiles.decode_block), FIELDS=FIELDS, EARLY=tiles.early, num_warps=4,
    )  # fmt: skip
    return cut


def attend_decodes(
    q: Tensor, kv: tuple[Tensor, Tensor], table: Tensor, cut: Cut, out: Tensor, heads: Heads, tiles: Tiles
) -> None:
    """Row i of q and out [n, heads, head_dim] is the token of sequence i, whose keys the cache already holds.

    The kernel launched last before this must be another than that of the cut, as the one that makes q is: what is
    EARLY reads the cut without waiting for it.
    """
    launch(
        _decode, (len(cut.items) * heads.num_kv_heads,),
        q, *kv, table, cut.items, out, cut.parts, cut.weights, table.stride(0), heads.head_dim**-0.5 * LOG2E,
        KH=heads.num_kv_heads, D=heads.head_dim, PAGE=kv[0].shape[1], GROUP=heads.group,
        ROWS=tiles.decode_rows(heads.group), BLOCK=tiles.decode_block, FIELDS=FIELDS, EARLY=tiles.early,
        num_warps=tiles.decode_warps, num_stages=tiles.decode_stages,
    )  # fmt: skip
    launch(
        _join, (len(cut.joins) * heads.num_heads,),
        cut.parts, cut.weights, cut.joins, out, H=heads.num_heads, D=heads.head_dim, SPAN=SPAN, FIELDS=FIELDS,
        EARLY=tiles.early, FIRST=len(cut.joins) >= LET_IN_FROM, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "count", "most"])
def _cut(
    lens_ptr,  # int32 [batch]
    items_ptr,  # int32 [count, FIELDS]
    joins_ptr,  # int32 [min(batch, most), FIELDS]
    batch,
    count,
    most,
    BATCH: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: EACH items, and the first of them all joins. An empty sequence has one item, which writes zeros.

    sum(max(ceil(length / size), 1)) <= batch + sum(length) / size <= count, whatever the lengths are. What is joined
    is longer than size, and size >= sum(length) / most: fewer than `most` sequences are.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    seq = tl.arange(0, BATCH)
    here = seq < batch
    length = tl.load(lens_ptr + seq, mask=here, other=0)
    size = tl.cdiv(tl.maximum(tl.cdiv(tl.sum(length, 0), most), LEAST), BLOCK) * BLOCK
    parts = tl.where(here, tl.maximum(tl.cdiv(length, size), 1), 0)
    end = tl.cumsum(parts, 0)
    item = tl.program_id(0) * EACH + tl.arange(0, EACH)
    mine = tl.sum((end[None, :] <= item[:, None]).to(tl.int32), 1)  # the sequence whose item it is
    this = seq[None, :] == mine[:, None]
    its_length = tl.sum(tl.where(this, length[None, :], 0), 1)
    its_parts = tl.sum(tl.where(this, parts[None, :], 0), 1)  # 0: there is no such item
    its_first = tl.sum(tl.where(this, (end - parts)[None, :], 0), 1)
    key = (item - its_first) * size
    to = items_ptr + item * FIELDS
    live = item < count
    tl.store(to, tl.minimum(mine, batch - 1), mask=live)  # of no sequence: some, for its blocks are looked up too
    tl.store(to + 1, key, mask=live)
    tl.store(to + 2, tl.minimum(key + size, its_length), mask=live)
    tl.store(to + 3, its_parts, mask=live)

    if tl.program_id(0) == 0:
        joined = (parts > 1).to(tl.int32)
        place = tl.cumsum(joined, 0) - 1
        join = joins_ptr + place * FIELDS
        tl.store(join, seq, mask=joined > 0)
        tl.store(join + 1, end - parts, mask=joined > 0)
        tl.store(join + 3, parts, mask=joined > 0)
        left = (seq >= tl.sum(joined, 0)) & (seq < tl.minimum(batch, most))
        tl.store(joins_ptr + seq * FIELDS + 3, 0, mask=left)


@triton.jit(do_not_specialize=["table_stride"])
def _decode(
    q_ptr,  # [n, KH * GROUP, D]
    k_ptr,  # [blocks, PAGE, KH, D]
    v_ptr,
    table_ptr,  # int32 [b, table_stride]
    items_ptr,  # int32 [items, FIELDS]
    out_ptr,  # [n, KH * GROUP, D]
    part_ptr,  # fp32 [items, KH * GROUP, D]
    weight_ptr,  # fp32 [items, KH * GROUP]
    table_stride,
    scale,
    KH: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: one item and the GROUP query heads of one KV head."""
    number = tl.program_id(0) // KH
    kv_head = tl.program_id(0) % KH
    item = items_ptr + number * FIELDS
    seq = tl.load(item)
    first = tl.load(item + 1)
    stop = tl.load(item + 2)
    parts = tl.load(item + 3)
    table = table_ptr + seq * table_stride
    blocks = blocks_of(table, first, stop, PAGE, BLOCK)
    if EARLY:  # what stands above lay there before the kernel before this one began
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if parts == 0:
        return

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    live = rows < GROUP
    head = kv_head * GROUP + rows
    at = (seq.to(tl.int64) * (KH * GROUP) + head) * D
    q = tl.load(q_ptr + at[:, None] + dims[None, :], mask=live[:, None], other=0.0)

    last = tl.zeros([ROWS], tl.int32) + (stop - 1)
    result, weight = attend_keys(
        q, last, k_ptr + kv_head * D, v_ptr + kv_head * D, table, blocks, first, stop, stop, scale,
        KH, D, PAGE, ROWS, BLOCK,
    )  # fmt: skip

    if parts == 1:
        tl.store(out_ptr + at[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=live[:, None])
        return
    slot = number * (KH * GROUP) + head
    tl.store(part_ptr + slot[:, None] * D + dims[None, :], result, mask=live[:, None])
    tl.store(weight_ptr + slot, weight, mask=live)


@triton.jit
def _join(
    part_ptr,  # fp32 [items, H, D]
    weight_ptr,  # fp32 [items, H]
    joins_ptr,  # int32 [joins, FIELDS]
    out_ptr,  # [n, H, D]
    H: tl.constexpr,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
    FIRST: tl.constexpr,
):
    """One program: one head of one sequence, SPAN parts at a time. There is nothing to do where no context was cut."""
    join = joins_ptr + tl.program_id(0) // H * FIELDS
    head = tl.program_id(0) % H
    seq = tl.load(join)
    first_item = tl.load(join + 1)
    parts = tl.load(join + 3)
    if EARLY:  # even with nothing to do: whoever waits for this one waits for the decodes before it
        if FIRST:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if not FIRST:
            tl.extra.cuda.gdc_launch_dependents()
    if parts == 0:
        return
    span = tl.arange(0, SPAN)
    dims = tl.arange(0, D)
    best = -1e30
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for start in range(0, parts, SPAN):
        live = start + span < parts
        at = (first_item + start + span) * H + head
        weight = tl.load(weight_ptr + at, mask=live, other=-1e30)
        value = tl.load(part_ptr + at[:, None] * D + dims[None, :], mask=live[:, None], other=0.0)
        new = tl.maximum(best, tl.max(weight, 0))
        p = tl.where(live, tl.exp2(weight - new), 0.0)
        fade = tl.exp2(best - new)
        total = total * fade + tl.sum(p, 0)
        acc = acc * fade + tl.sum(value * p[:, None], 0)
        best = new
    to = out_ptr + (seq.to(tl.int64) * H + head) * D + dims
    tl.store(to, (acc / total).to(out_ptr.dtype.element_ty))
