"""Blocks of the paged cache fetched by TMA, in Gluon: which ones a tile of a prompt sees, and the warp that gets them.

Knows the block layout, and heads of 128 in two halves of 64: what TMA takes at a time. Does not know what is done with
keys and values. Importing this file imports Triton.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

HALF = gl.constexpr(64)


@gluon.jit
def tile_of(work_ptr, KH: gl.constexpr, FIELDS: gl.constexpr):
    """(sequence, first row of the step, tokens, context before them, KV head) of this program."""
    tile = work_ptr + gl.program_id(0) // KH * FIELDS
    return gl.load(tile), gl.load(tile + 1), gl.load(tile + 2), gl.load(tile + 3), gl.program_id(0) % KH


@gluon.jit
def turns_of(tokens, context, KEYS: gl.constexpr):
    """Turns of keys; none for a tile of no tokens, which is no tile."""
    return gl.where(tokens > 0, gl.cdiv(context + tokens, KEYS), 0)


@gluon.jit
def _row_of(table, at, PAGE: gl.constexpr, BOX: gl.constexpr):
    """Where in the cache the box with this key begins."""
    row = gl.load(table + at // PAGE) * PAGE
    if BOX < PAGE:
        row += at % PAGE // BOX * BOX
    return row


@gluon.jit
def rows_of(table, first, end, COUNT: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr):
    """Where boxes of keys begin; all looked up before one is used. Past the end stands the last one again."""
    rows = (_row_of(table, gl.minimum(first, end), PAGE, BOX),)
    for j in gl.static_range(1, COUNT):
        row = _row_of(table, gl.minimum(first + j * BOX, end), PAGE, BOX)
        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
    return rows


@gluon.jit
def get(box, rows, column, full, low, high, COUNT: gl.constexpr, BOX: gl.constexpr):
    """Keys or values fetched, and `full` told to expect them."""
    mbarrier.expect(full, COUNT * BOX * HALF * 4)
    for j in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(box, [rows[j], column], full, low.slice(j * BOX, BOX, 0))
        tma.async_copy_global_to_shared(box, [rows[j], column + HALF], full, high.slice(j * BOX, BOX, 0))


@gluon.jit
def fetch(
    k_box, v_box, table_ptr, work_ptr, table_stride, k0, k1, v0, v1, k_full, k_empty, v_full, v_empty,
    KH: gl.constexpr, PAGE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr,
):  # fmt: skip
    """One warp: the keys and values that the tile may see, from their end to their beginning.

    A block past the end may be another's, and hold what is not a number: it is never fetched.
    """
    seq, _first_row, tokens, context, kv_head = tile_of(work_ptr, KH, FIELDS)
    turns = turns_of(tokens, context, KEYS)
    table = table_ptr + seq * table_stride
    column = kv_head * (2 * HALF)
    BOX: gl.constexpr = k_box.block_shape[0]
    for i in range(turns):
        at = i % STAGES
        phase = (i // STAGES) & 1
        rows = rows_of(table, (turns - 1 - i) * KEYS, context + tokens - 1, KEYS // BOX, PAGE, BOX)
        mbarrier.wait(k_empty.index(at), phase ^ 1)
        get(k_box, rows, column, k_full.index(at), k0.index(at), k1.index(at), KEYS // BOX, BOX)
        mbarrier.wait(v_empty.index(at), phase ^ 1)
        get(v_box, rows, column, v_full.index(at), v0.index(at), v1.index(at), KEYS // BOX, BOX)
