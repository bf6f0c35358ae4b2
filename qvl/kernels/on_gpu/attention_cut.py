"""Contexts of a step's decodes cut into items of about equal length, in Triton.

The cut is made on the device, from lengths that only the device has to know, so that a step of decodes can be recorded
in a CUDA graph once and replayed with other lengths. Knows lengths. Does not know keys and values: that is
`attention_decode`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels.gpu import Tiles, launch, next_power_of_2
from qvl.layers.attention import Heads

# int32 of an item: its sequence, first key, end, and how many the sequence has; 0: there is no such item.
ITEM_FIELDS = 4
JOIN_FIELDS = 2  # int32 of a sequence: its first item, and how many it has; one: there is nothing to join
COMMON_BATCH = 256  # steps of up to so many decodes are cut by one compilation
PER_MULTIPROCESSOR = 4  # programs that fit there at a time
# Sequences from which on the last program of each joins its parts. With fewer there are many parts of each: a kernel
# behind joins them sooner.
MANY = 24
LEAST, LEAST_OF_MANY = 64, 128  # keys of an item: with fewer, joining costs more than reading
MOST_PARTS = 32  # of each of many sequences: one program joins them


@dataclass(slots=True)
class Cut:
    """The items of a step's decodes, and what their parts are joined from."""

    items: Tensor  # int32 [items, ITEM_FIELDS]
    joins: Tensor  # int32 [batch, JOIN_FIELDS]
    arrived: Tensor  # int32 [batch, kv_heads]: parts that are there; zeros between two layers
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
    count, device, many = batch + most, seq_lens.device, batch >= MANY
    cut = Cut(
        torch.empty((count, ITEM_FIELDS), dtype=torch.int32, device=device),
        torch.empty((batch, JOIN_FIELDS), dtype=torch.int32, device=device),
        torch.empty((batch, heads.num_kv_heads), dtype=torch.int32, device=device),
        torch.empty((count, heads.num_heads, heads.head_dim), dtype=torch.float32, device=device),
        torch.empty((count, heads.num_heads), dtype=torch.float32, device=device),
    )
    launch(
        _cut, (batch,),
        seq_lens, cut.items, cut.joins, cut.arrived, batch, count, most,
        KH=heads.num_kv_heads, PLACES=next_power_of_2(heads.num_kv_heads),
        BATCH=max(COMMON_BATCH, next_power_of_2(batch)), BLOCK=tiles.decode_block,
        LEAST=max(LEAST_OF_MANY if many else LEAST, tiles.decode_block), MOST_PARTS=MOST_PARTS if many else 0,
        ITEM_FIELDS=ITEM_FIELDS, JOIN_FIELDS=JOIN_FIELDS, EARLY=tiles.early, num_warps=4,
    )  # fmt: skip
    return cut


@triton.jit(do_not_specialize=["batch", "count", "most"])
def _cut(
    lens_ptr,  # int32 [batch]
    items_ptr,  # int32 [count, ITEM_FIELDS]
    joins_ptr,  # int32 [batch, JOIN_FIELDS]
    arrived_ptr,  # int32 [batch, KH]
    batch,
    count,
    most,
    KH: tl.constexpr,
    PLACES: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    ITEM_FIELDS: tl.constexpr,
    JOIN_FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: the items of a sequence. An empty one has one item, which writes zeros.

    sum(max(ceil(length / size), 1)) <= batch + sum(length) / size <= count, whatever the lengths are. Those of a
    sequence are equally long: else the last of each would leave the GPU half empty.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    mine = tl.program_id(0)
    seq = tl.arange(0, BATCH)
    length = tl.load(lens_ptr + seq, mask=seq < batch, other=0)
    size = tl.cdiv(tl.maximum(tl.cdiv(tl.sum(length, 0), most), LEAST), BLOCK) * BLOCK
    parts = tl.cdiv(length, size)
    if MOST_PARTS > 0:
        parts = tl.minimum(parts, MOST_PARTS)
    parts = tl.where(seq < batch, tl.maximum(parts, 1), 0)
    end = tl.cumsum(parts, 0)
    my_parts = tl.sum(tl.where(seq == mine, parts, 0), 0)
    my_first = tl.sum(tl.where(seq == mine, end, 0), 0) - my_parts
    stop = tl.load(lens_ptr + mine)
    each = tl.cdiv(tl.cdiv(stop, my_parts), BLOCK) * BLOCK
    for i in range(my_parts):
        to = items_ptr + (my_first + i) * ITEM_FIELDS
        tl.store(to, mine)
        tl.store(to + 1, i * each)
        tl.store(to + 2, tl.minimum(i * each + each, stop))
        tl.store(to + 3, my_parts)
    tl.store(joins_ptr + mine * JOIN_FIELDS, my_first)
    tl.store(joins_ptr + mine * JOIN_FIELDS + 1, my_parts)
    place = tl.arange(0, PLACES)
    tl.store(arrived_ptr + mine * KH + place, tl.zeros([PLACES], tl.int32), mask=place < KH)
    if mine == 0:
        for start in range(tl.sum(parts, 0), count, BATCH):
            to = items_ptr + (start + seq) * ITEM_FIELDS
            none = tl.zeros([BATCH], tl.int32)  # of the first sequence: blocks are looked up for them too
            tl.store(to, none, mask=start + seq < count)
            tl.store(to + 1, none, mask=start + seq < count)
            tl.store(to + 2, none, mask=start + seq < count)
            tl.store(to + 3, none, mask=start + seq < count)
