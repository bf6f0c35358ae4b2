"""Attention of prompts over the paged cache, in Triton: tiles of query rows against all the keys that they may see.

Knows the block layout, and the running softmax that decoding shares. Does not know how a step is planned.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels.gpu import Tiles, launch
from qvl.layers.attention import TILE_FIELDS as FIELDS
from qvl.layers.attention import Heads

LOG2E = 1.4426950408889634


def attend_prefills(
    q: Tensor, kv: tuple[Tensor, Tensor], table: Tensor, work: Tensor, out: Tensor, heads: Heads, tiles: Tiles
) -> None:
    """q and out [n, heads, head_dim]; the cache already holds the keys of this step. The kernel launched next may begin
    before this one ends.
    """
    launch(
        _prefill, (len(work) * heads.num_kv_heads,),
        q, *kv, table, work, out, table.stride(0), heads.head_dim**-0.5 * LOG2E,
        KH=heads.num_kv_heads, D=heads.head_dim, PAGE=kv[0].shape[1], GROUP=heads.group, ROWS=tiles.rows,
        BLOCK=tiles.block, FIELDS=FIELDS, EARLY=tiles.early, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@triton.jit
def blocks_of(table_ptr, first, stop, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Which blocks of the cache hold the keys [first, first + BLOCK); from `stop` on, that of the key before it."""
    return tl.load(table_ptr + tl.minimum(first + tl.arange(0, BLOCK), tl.maximum(stop, 1) - 1) // PAGE)


@triton.jit
def attend_keys(
    q,  # [ROWS, D]
    last,  # [ROWS], the last key that each row may see
    k_ptr,  # the cache at this KV head
    v_ptr,
    table_ptr,  # the blocks of this sequence
    page,  # [BLOCK], those of the first turn
    first,
    all_see,  # of the keys before this one no row may miss one
    stop,
    scale,
    KH: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Softmax over the keys [first, stop): (its result [ROWS, D], log2 of the sum of the exponentials [ROWS]).

    Past the end stands the last key again, with no weight: a block that belongs to another may hold what is not a
    number. The blocks of the next turn are looked up a turn ahead, else its keys would be asked for too late.
    """
    dims = tl.arange(0, D)
    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    keys = tl.arange(0, BLOCK)
    end = tl.maximum(stop, 1) - 1
    for start in range(first, stop, BLOCK):
        t = tl.minimum(start + keys, end)
        where = (page.to(tl.int64) * (PAGE * KH * D) + t % PAGE * (KH * D))[:, None] + dims[None, :]
        page = blocks_of(table_ptr, start + BLOCK, stop, PAGE, BLOCK)
        k = tl.load(k_ptr + where)
        v = tl.load(v_ptr + where)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if start + BLOCK > all_see:
            s = tl.where((start + keys)[None, :] <= last[:, None], s, -1e30)
        new = tl.maximum(best, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new[:, None])
        fade = tl.exp2(best - new)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        best = new
    total = tl.maximum(total, 1e-30)  # no keys: zeros
    return acc / total[:, None], best + tl.log2(total)


@triton.jit(do_not_specialize=["table_stride"])
def _prefill(
    q_ptr,  # [n, KH * GROUP, D]
    k_ptr,  # [blocks, PAGE, KH, D]
    v_ptr,
    table_ptr,  # int32 [b, table_stride]
    tiles_ptr,  # int32 [tiles, FIELDS]; of no tokens: there is no such tile
    out_ptr,  # [n, KH * GROUP, D]
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
    """One program: one tile and the GROUP query heads of one KV head; row r is head r % GROUP of token r // GROUP."""
    if EARLY:  # in this order: whoever runs beside this relies on what this has waited for
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tiles_ptr + tl.program_id(0) // KH * FIELDS
    kv_head = tl.program_id(0) % KH
    table = table_ptr + tl.load(tile) * table_stride
    first_row = tl.load(tile + 1)
    tokens = tl.load(tile + 2)
    context = tl.load(tile + 3)
    if tokens == 0:
        return

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    token = rows // GROUP
    live = token < tokens
    at = ((first_row + token).to(tl.int64) * (KH * GROUP) + kv_head * GROUP + rows % GROUP) * D
    q = tl.load(q_ptr + at[:, None] + dims[None, :], mask=live[:, None], other=0.0)

    stop = context + tokens
    result, _ = attend_keys(
        q, context + token, k_ptr + kv_head * D, v_ptr + kv_head * D, table, blocks_of(table, 0, stop, PAGE, BLOCK),
        0, context + 1, stop, scale, KH, D, PAGE, ROWS, BLOCK,
    )  # fmt: skip
    tl.store(out_ptr + at[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=live[:, None])
