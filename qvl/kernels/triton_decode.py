"""Attention of decodes over the paged cache, in Triton: contexts cut into items, and joined by whoever ends last.

The cut is made on the device, from lengths that only the device has to know, so that a step of decodes can be recorded
in a CUDA graph once and replayed with other lengths. Knows the block layout. Does not know how a step is planned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels.gpu import Tiles, launch
from qvl.kernels.triton_prefill import LOG2E, attend_keys
from qvl.layers.attention import Heads

FIELDS = (
    8  # int32 of an item: sequence, its length, first key, end, first item of the sequence, how many it has; unused
)
ITEMS_EACH = 16  # that one program of the cut writes
COMMON_BATCH = 256  # steps of up to so many decodes are cut by one compilation
PER_MULTIPROCESSOR = 4  # programs that fit there at a time
LEAST = 128  # keys of an item: with fewer, joining costs more than reading
SPAN = 8  # parts that are joined at a time


@dataclass(slots=True)
class Cut:
    """The items of a step's decodes, and what they need to join those of one sequence."""

    items: Tensor  # int32 [batch + most, FIELDS]
    arrived: Tensor  # int32 [batch, kv_heads], items of a sequence that have ended: 0 before and after every layer
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
        torch.empty((batch, heads.num_kv_heads), dtype=torch.int32, device=device),
        torch.empty((count, heads.num_heads, heads.head_dim), dtype=torch.float32, device=device),
        torch.empty((count, heads.num_heads), dtype=torch.float32, device=device),
    )
    launch(
        _cut, (triton.cdiv(count, ITEMS_EACH),),
        seq_lens, cut.items, cut.arrived, batch, count, most, KH=heads.num_kv_heads,
        BATCH=max(COMMON_BATCH, triton.next_power_of_2(batch)), EACH=ITEMS_EACH, BLOCK=tiles.decode_block,
        LEAST=max(LEAST, tiles.decode_block), FIELDS=FIELDS, EARLY=tiles.early, num_warps=4,
    )  # fmt: skip
    return cut


def attend_decodes(
    q: Tensor, kv: tuple[Tensor, Tensor], table: Tensor, cut: Cut, out: Tensor, heads: Heads, tiles: Tiles
) -> None:
    """Row i of q and out [n, heads, head_dim] is the token of sequence i, whose keys the cache already holds."""
    launch(
        _decode, (len(cut.items) * heads.num_kv_heads,),
        q, *kv, table, cut.items, cut.arrived, out, cut.parts, cut.weights, table.stride(0),
        heads.head_dim**-0.5 * LOG2E,
        KH=heads.num_kv_heads, D=heads.head_dim, PAGE=kv[0].shape[1], GROUP=heads.group,
        HEADS=triton.next_power_of_2(heads.group), ROWS=tiles.decode_rows(heads.group), BLOCK=tiles.decode_block,
        SPAN=SPAN, FIELDS=FIELDS, EARLY=tiles.early, num_warps=4, num_stages=tiles.decode_stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "count", "most"])
def _cut(
    lens_ptr,  # int32 [batch]
    items_ptr,  # int32 [count, FIELDS]
    arrived_ptr,  # int32 [batch, KH]
    batch,
    count,
    most,
    KH: tl.constexpr,
    BATCH: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: EACH items. An empty sequence has one item without keys, which writes zeros.

    sum(max(ceil(length / size), 1)) <= batch + sum(length) / size <= count, whatever the lengths are.
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
    tl.store(to, mine, mask=live)
    tl.store(to + 1, key, mask=live)
    tl.store(to + 2, tl.minimum(key + size, its_length), mask=live)
    tl.store(to + 3, its_first, mask=live)
    tl.store(to + 4, its_parts, mask=live)
    for kv_head in tl.static_range(KH):
        tl.store(arrived_ptr + seq * KH + kv_head, 0, mask=here & (tl.program_id(0) == 0))


@triton.jit
def _decode(
    q_ptr,  # [n, KH * GROUP, D]
    k_ptr,  # [blocks, PAGE, KH, D]
    v_ptr,
    table_ptr,  # int32 [b, table_stride]
    items_ptr,  # int32 [items, FIELDS]
    arrived_ptr,  # int32 [b, KH]
    out_ptr,  # [n, KH * GROUP, D]
    part_ptr,  # fp32 [items, KH * GROUP, D]
    weight_ptr,  # fp32 [items, KH * GROUP]
    table_stride,
    scale,
    KH: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: one item and the GROUP query heads of one KV head."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    number = tl.program_id(0) // KH
    kv_head = tl.program_id(0) % KH
    item = items_ptr + number * FIELDS
    seq = tl.load(item)
    first = tl.load(item + 1)
    stop = tl.load(item + 2)
    first_item = tl.load(item + 3)
    parts = tl.load(item + 4)
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
        q, last, k_ptr + kv_head * D, v_ptr + kv_head * D, table_ptr + seq * table_stride, first, stop, stop, scale,
        KH, D, PAGE, ROWS, BLOCK,
    )  # fmt: skip

    if parts == 1:
        tl.store(out_ptr + at[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=live[:, None])
        return
    slot = number * (KH * GROUP) + head
    tl.store(part_ptr + slot[:, None] * D + dims[None, :], result, mask=live[:, None])
    tl.store(weight_ptr + slot, weight, mask=live)
    tl.debug_barrier()  # every thread's part is written before one of them says so
    counter = arrived_ptr + seq * KH + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
        tl.store(counter, 0)  # for the next layer
        _join(part_ptr, weight_ptr, out_ptr, seq, kv_head, first_item, parts, KH, D, GROUP, HEADS, SPAN)


@triton.jit
def _join(
    part_ptr,
    weight_ptr,
    out_ptr,
    seq,
    kv_head,
    first_item,
    parts,
    KH: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The parts of a sequence become its result, SPAN at a time. Past the first-level cache: others wrote them."""
    head = tl.arange(0, HEADS)
    dims = tl.arange(0, D)
    best = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, D], tl.float32)
    for start in range(0, parts, SPAN):
        part = start + tl.arange(0, SPAN)
        live = (part < parts)[:, None] & (head < GROUP)[None, :]
        at = (first_item + part)[:, None] * (KH * GROUP) + kv_head * GROUP + head[None, :]
        weight = tl.load(weight_ptr + at, mask=live, other=-1e30, cache_modifier=".cg")
        value = tl.load(
            part_ptr + at[:, :, None] * D + dims[None, None, :], mask=live[:, :, None], other=0.0, cache_modifier=".cg"
        )
        new = tl.maximum(best, tl.max(weight, 0))
        p = tl.where(live, tl.exp2(weight - new[None, :]), 0.0)
        fade = tl.exp2(best - new)
        total = total * fade + tl.sum(p, 0)
        acc = acc * fade[:, None] + tl.sum(value * p[:, :, None], 0)
        best = new
    to = out_ptr + (seq.to(tl.int64) * (KH * GROUP) + kv_head * GROUP + head)[:, None] * D + dims[None, :]
    result = acc / tl.maximum(total, 1e-30)[:, None]
    tl.store(to, result.to(out_ptr.dtype.element_ty), mask=(head < GROUP)[:, None])
