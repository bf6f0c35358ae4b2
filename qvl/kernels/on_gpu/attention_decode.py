"""Attention of decodes over the paged cache, in Triton: items of contexts, and the parts of long ones joined.

Knows the block layout. Does not know how a step is planned, nor how contexts are cut (`attention_cut`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels.gpu import Tiles, launch, next_power_of_2
from qvl.kernels.on_gpu.attention_cut import ITEM_FIELDS, JOIN_FIELDS, MANY, Cut
from qvl.kernels.on_gpu.attention_prefill import LOG2E, attend_keys, blocks_of
from qvl.layers.attention import Heads

# Sequences from which on the product behind a join is let in before the join has waited, and fetches weights meanwhile.
# The programs of the product for one row fill a multiprocessor: they come when there is room.
LET_IN_FROM = 2
JOIN_SPAN = 32  # parts of a head that a program of `_join` takes at a time
MERGE_SPAN = 4  # and a program of `_decode` of all its heads


def attend_decodes(
    q: Tensor, kv: tuple[Tensor, Tensor], table: Tensor, cut: Cut, out: Tensor, heads: Heads, tiles: Tiles, beside: bool
) -> None:
    """Row i of q and out [n, heads, head_dim] is the token of sequence i, whose keys the cache already holds.

    The kernel launched last before this must be another than that of the cut, as the one that makes q is: what is
    EARLY reads the cut without waiting for it. `beside`: it is the one for the prompts of this step, which may own the
    rows of sequences that are empty; this one runs where it leaves multiprocessors idle.
    """
    batch = len(cut.joins)
    many = batch >= MANY
    launch(
        _decode, (len(cut.items) * heads.num_kv_heads + beside,),
        q, *kv, table, cut.items, cut.joins, cut.arrived, out, cut.parts, cut.weights, table.stride(0), int(beside),
        heads.head_dim**-0.5 * LOG2E, KH=heads.num_kv_heads, D=heads.head_dim, PAGE=kv[0].shape[1], GROUP=heads.group,
        ROWS=tiles.decode_rows(heads.group), BLOCK=tiles.decode_block, MERGE=MERGE_SPAN if many else 0,
        HEADS=next_power_of_2(heads.group), ITEM_FIELDS=ITEM_FIELDS, JOIN_FIELDS=JOIN_FIELDS, EARLY=tiles.early,
        num_warps=tiles.decode_warps, num_stages=tiles.decode_stages if batch > 1 else min(tiles.decode_stages, 3),
    )  # fmt: skip
    if not many:
        launch(
            _join, (batch * heads.num_heads,),
            cut.parts, cut.weights, cut.joins, out, H=heads.num_heads, D=heads.head_dim, SPAN=JOIN_SPAN,
            JOIN_FIELDS=JOIN_FIELDS, EARLY=tiles.early, FIRST=batch >= LET_IN_FROM, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride", "beside"])
def _decode(
    q_ptr,  # [n, KH * GROUP, D]
    k_ptr,  # [blocks, PAGE, KH, D]
    v_ptr,
    table_ptr,  # int32 [b, table_stride]
    items_ptr,  # int32 [items, ITEM_FIELDS]
    joins_ptr,  # int32 [b, JOIN_FIELDS]
    arrived_ptr,  # int32 [b, KH]
    out_ptr,  # [n, KH * GROUP, D]
    part_ptr,  # fp32 [items, KH * GROUP, D]
    weight_ptr,  # fp32 [items, KH * GROUP]
    table_stride,
    beside,  # 0 or 1
    scale,
    KH: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MERGE: tl.constexpr,
    HEADS: tl.constexpr,
    ITEM_FIELDS: tl.constexpr,
    JOIN_FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: one item and the GROUP query heads of one KV head.

    With MERGE the last program of a sequence joins its parts, so many at a time.

    `beside` the prompts nobody waits for their end: their programs have all begun, and each of them waited for q and
    the keys. They read and write nothing that is written here: rows of `out` are theirs or ours. One program more waits
    for them, as whoever waits for this kernel must not begin before they are done.
    """
    if (beside == 1) & (tl.program_id(0) == tl.num_programs(0) - 1):
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        return
    number = tl.program_id(0) // KH
    kv_head = tl.program_id(0) % KH
    item = items_ptr + number * ITEM_FIELDS
    seq = tl.load(item)
    first = tl.load(item + 1)
    stop = tl.load(item + 2)
    parts = tl.load(item + 3)
    table = table_ptr + seq * table_stride
    blocks = blocks_of(table, first, stop, PAGE, BLOCK)
    if EARLY:  # what stands above lay there before the kernel before this one began
        if beside == 0:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if (parts == 0) | ((beside == 1) & (stop == 0)):
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
    if MERGE > 0:
        tl.debug_barrier()  # all of this part is written
        arrived = arrived_ptr + seq * KH + kv_head
        if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == parts - 1:
            tl.store(arrived, 0)  # for the next layer
            heads = tl.arange(0, HEADS)
            joined = _merged(
                part_ptr, weight_ptr, kv_head * GROUP + heads, heads < GROUP, tl.load(joins_ptr + seq * JOIN_FIELDS),
                parts, KH * GROUP, D, MERGE, HEADS,
            )  # fmt: skip
            to = out_ptr + (seq.to(tl.int64) * (KH * GROUP) + kv_head * GROUP + heads)[:, None] * D + dims[None, :]
            tl.store(to, joined.to(out_ptr.dtype.element_ty), mask=(heads < GROUP)[:, None])


@triton.jit
def _merged(
    part_ptr, weight_ptr, head, live, first, parts,
    H: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """What the parts of a sequence are together, for HEADS heads [HEADS, D], SPAN parts at a time.

    They are read where all multiprocessors see them: another one may have written them a moment ago.
    """
    span = tl.arange(0, SPAN)
    dims = tl.arange(0, D)
    best = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, D], tl.float32)
    for start in range(0, parts, SPAN):
        part = start + span
        there = (part < parts)[:, None] & live[None, :]
        at = (first + part)[:, None] * H + head[None, :]
        weight = tl.load(weight_ptr + at, mask=there, other=-1e30, cache_modifier=".cg")
        value_at = part_ptr + at[:, :, None] * D + dims[None, None, :]
        value = tl.load(value_at, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        new = tl.maximum(best, tl.max(weight, 0))
        p = tl.where(there, tl.exp2(weight - new[None, :]), 0.0)
        fade = tl.exp2(best - new)
        total = total * fade + tl.sum(p, 0)
        acc = acc * fade[:, None] + tl.sum(value * p[:, :, None], 0)
        best = new
    return acc / tl.maximum(total, 1e-30)[:, None]


@triton.jit
def _join(
    part_ptr,  # fp32 [items, H, D]
    weight_ptr,  # fp32 [items, H]
    joins_ptr,  # int32 [b, JOIN_FIELDS]
    out_ptr,  # [n, H, D]
    H: tl.constexpr,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    JOIN_FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
    FIRST: tl.constexpr,
):
    """One program: one head of one sequence. Nothing is done where its context was not cut."""
    seq = tl.program_id(0) // H
    head = tl.program_id(0) % H + tl.arange(0, 1)
    first = tl.load(joins_ptr + seq * JOIN_FIELDS)
    parts = tl.load(joins_ptr + seq * JOIN_FIELDS + 1)
    if EARLY:  # even with nothing to do: whoever waits for this one waits for the decodes before it
        if FIRST:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if not FIRST:
            tl.extra.cuda.gdc_launch_dependents()
    if parts == 1:
        return
    result = _merged(part_ptr, weight_ptr, head, head < H, first, parts, H, D, SPAN, 1)
    to = out_ptr + (seq.to(tl.int64) * H + head)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(to, result.to(out_ptr.dtype.element_ty))
