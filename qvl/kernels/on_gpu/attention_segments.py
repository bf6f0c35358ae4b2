"""Attention inside segments for compute capability 9.0, in Gluon, the part of Triton that says which warps do what.

One program takes 64 query rows of one head. One warp fetches keys and values by TMA. Four others multiply on tensor
cores while they take exponentials, as the last weights times values are under way while the softmax of these scores
goes on. Two programs share a multiprocessor: where one waits, the other computes. head_dim is two powers of two (80 =
64 + 16), each with its own tiles: torch's kernels fill 80 up to 96 or 128.

Knows tensors of queries, keys and values. Does not know pictures; `attention_pictures` takes the large ones. Importing
this file imports Triton; `qvl.kernels.segments` does so only where such a GPU is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from qvl.kernels.gpu import launch
from qvl.kernels.on_gpu.attention_turns import (
    LIMITS,
    NOTHING,
    add_values,
    attend_again,
    barriers,
    beyond,
    clear,
    part_sums,
    running,
    scores,
    weigh,
)
from qvl.kernels.on_gpu.boxes import described, meet
from qvl.kernels.segments import halves

ROWS = gl.constexpr(64)  # query rows of a program: what four warps multiply at a time
FORMS = (ROWS.value,)  # the rows of a tile that it takes
NAME = "Triton"
FIELDS = 4  # int32 of a tile: first query row, rows, first key of its segment, keys
KEYS, STAGES = 128, 2  # keys a turn; turns of keys, and of values, that are fetched ahead
REGISTERS = 128  # of a thread at the start: the four warps take those that fetching leaves


def rows_for(lengths: Sequence[int]) -> int:
    """Query rows of a tile."""
    return ROWS.value


def tiles_of(lengths: Sequence[int], rows: int) -> np.ndarray:
    """int32 [tiles, FIELDS]: the query rows of consecutive segments; those with the most keys first, so that none of
    them runs last.
    """
    found, start = [], 0
    for length in lengths:
        at = np.arange(0, length, rows, dtype=np.int32)
        tiles = np.empty((len(at), FIELDS), dtype=np.int32)
        tiles[:, 0], tiles[:, 1] = start + at, np.minimum(rows, length - at)
        tiles[:, 2:] = start, length
        found.append(tiles)
        start += length
    together = np.concatenate(found)
    return np.ascontiguousarray(together[np.argsort(-together[:, 3], kind="stable")])


def attend_segments(qkv: Tensor, tiles: Tensor, rows: int) -> Tensor:
    """qkv [n, 3, heads, head_dim] contiguous, its queries scaled: [n, heads * head_dim], which is where they lay.
    `tiles` are of so many rows.
    """
    assert rows in FORMS
    length, _, heads, dim = qkv.shape
    flat, count = qkv.view(length, 3 * heads * dim), tiles.shape[0]
    launch(
        _segments, (count * heads,),
        *described(flat, *boxes_of(dim)), tiles, qkv, 3 * heads * dim, count, heads * dim,
        LIMITS[qkv.dtype], D=dim, KEYS=KEYS, STAGES=STAGES,
        FIELDS=FIELDS, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return flat[:, : heads * dim]


@functools.cache
def boxes_of(head_dim: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of what is fetched at a time: both parts of the queries, and of the keys or values."""
    both = halves(head_dim)
    assert both is not None
    return tuple((rows, columns) for rows in (ROWS.value, KEYS) for columns in both)


@gluon.jit
def _fetch(
    k_low, k_high, tiles_ptr, tiles, width, k0, k1, v0, v1, k_full, k_empty, v_full, v_empty,
    D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr,
):  # fmt: skip
    """The keys and values of a segment, from its end to its beginning, as their places become free."""
    LOW: gl.constexpr = k0.shape[2]
    tile = tiles_ptr + gl.program_id(0) % tiles * FIELDS
    first_key = gl.load(tile + 2)
    turns = gl.cdiv(gl.load(tile + 3), KEYS)
    k_column = width + gl.program_id(0) // tiles * D
    v_column = width + k_column
    for i in range(turns):
        at = i % STAGES
        phase = (i // STAGES) & 1
        row = first_key + (turns - 1 - i) * KEYS
        mbarrier.wait(k_empty.index(at), phase ^ 1)
        mbarrier.expect(k_full.index(at), KEYS * D * 2)
        tma.async_copy_global_to_shared(k_low, [row, k_column], k_full.index(at), k0.index(at))
        tma.async_copy_global_to_shared(k_high, [row, k_column + LOW], k_full.index(at), k1.index(at))
        mbarrier.wait(v_empty.index(at), phase ^ 1)
        mbarrier.expect(v_full.index(at), KEYS * D * 2)
        tma.async_copy_global_to_shared(k_low, [row, v_column], v_full.index(at), v0.index(at))
        tma.async_copy_global_to_shared(k_high, [row, v_column + LOW], v_full.index(at), v1.index(at))


@gluon.jit
def _store(to_ptr, acc, total, live, stride):
    """Rows of the result that are in the segment."""
    L: gl.constexpr = acc.type.layout
    row = gl.arange(0, acc.shape[0], gl.SliceLayout(1, L))
    column = gl.arange(0, acc.shape[1], gl.SliceLayout(0, L))
    out = acc / gl.convert_layout(total, gl.SliceLayout(1, L))[:, None]
    at = to_ptr + row.to(gl.int64)[:, None] * stride + column[None, :]
    gl.store(at, out.to(to_ptr.dtype.element_ty), mask=(row < live)[:, None])


@gluon.jit
def _attend(
    q_low, q_high, tiles_ptr, out_ptr, stride, tiles, width, limit, q0, q1, q_full,
    k0, k1, v0, v1, k_full, k_empty, v_full, v_empty,
    D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr,
):  # fmt: skip
    """Four warps: the rows of the tile against all keys of the segment. The queries come scaled."""
    LOW: gl.constexpr = k0.shape[2]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LOW, 16])
    O1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D - LOW, 16])
    tile = tiles_ptr + gl.program_id(0) % tiles * FIELDS
    column = gl.program_id(0) // tiles * D
    first_row = gl.load(tile)
    live = gl.load(tile + 1)
    length = gl.load(tile + 3)
    turns = gl.cdiv(length, KEYS)
    left = length - (turns - 1) * KEYS

    _get(q_low, q_high, first_row, column, q_full, q0, q1)
    mbarrier.wait(q_full, 0)
    a0 = q0.load(gl.DotOperandLayout(0, S, 2))
    a1 = q1.load(gl.DotOperandLayout(0, S, 2))

    # The segment's last keys come first: only they need a mask.
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=(scores(a0, a1, k0.index(0), k1.index(0), KEYS, S),))
    mbarrier.arrive(k_empty.index(0))
    s = gl.where((gl.arange(0, KEYS, gl.SliceLayout(0, S)) < left)[None, :], s, NOTHING)
    none = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, S))
    acc0 = gl.zeros((ROWS, LOW), gl.float32, O0)
    acc1 = gl.zeros((ROWS, D - LOW), gl.float32, O1)
    e, shift, _total, acc0, acc1 = running(s, none + NOTHING, none, acc0, acc1)
    total = part_sums(e)
    weights = e.to(q_low.dtype)
    mbarrier.wait(v_full.index(0), 0)
    if left < KEYS:
        clear(v0.index(0), left)
        clear(v1.index(0), left)
        fence_async_shared()
        meet()

    mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1, pred=turns > 1)
    for i in range(1, turns):
        at = i % STAGES
        last = (i - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((i - 1) // STAGES) & 1)
        under_way = scores(a0, a1, k0.index(at), k1.index(at), KEYS, S)
        next0, next1 = add_values(weights, v0.index(last), v1.index(last), acc0, acc1)
        weights, acc0, acc1, total = weigh(
            under_way, next0, next1, weights, shift, 1.0, total, k_empty.index(at), v_empty.index(last),
            k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, i + 1 < turns,
        )  # fmt: skip

    last = (turns - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((turns - 1) // STAGES) & 1)
    next0, next1 = add_values(weights, v0.index(last), v1.index(last), acc0, acc1)
    whole = gl.sum(total, 1)
    acc0, acc1, weights = warpgroup_mma_wait(0, deps=(next0, next1, weights))
    if beyond(whole, limit, live):
        source = q_low, q_high, gl.load(tile + 2), width + column, width
        last_key = gl.zeros_like(whole).to(gl.int32) + (length - 1)
        acc0, acc1, whole = attend_again(
            _get_again, source, length, last_key, q0, q1, q_full, 1, 1.0, acc0, acc1, whole
        )
    to_ptr = out_ptr + first_row.to(gl.int64) * stride + column
    _store(to_ptr, acc0, whole, live, stride)
    _store(to_ptr + LOW, acc1, whole, live, stride)


@gluon.jit
def _get(low, high, row, column, full, to0, to1):
    """Rows of both parts of a head fetched, and `full` told to expect them."""
    mbarrier.expect(full, to0.shape[0] * (to0.shape[1] + to1.shape[1]) * 2)
    tma.async_copy_global_to_shared(low, [row, column], full, to0)
    tma.async_copy_global_to_shared(high, [row, column + to0.shape[1]], full, to1)


@gluon.jit
def _get_again(values: gl.constexpr, source, start, full, to0, to1):
    """Keys or values from one of the segment on, for `attend_again`."""
    low, high, first_key, k_column, width = source
    _get(low, high, first_key + start, k_column + width if values else k_column, full, to0, to1)


@gluon.jit
def _places(box, count: gl.constexpr):
    """Shared memory for so many boxes."""
    return gl.allocate_shared_memory(box.dtype, [count] + box.block_shape, box.layout)  # noqa: RUF005


@gluon.jit(do_not_specialize=["tiles"])
def _segments(
    q_low, q_high, k_low, k_high,  # the same memory [n, 3 * width], in boxes of half a head_dim
    tiles_ptr,  # int32 [tiles, FIELDS]
    out_ptr,  # [n, stride]: the results go where the queries are
    stride,
    tiles,
    width,  # heads * D
    limit,  # of LIMITS
    D: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    FIELDS: gl.constexpr,
):  # fmt: skip
    """One program: one tile and one head; all tiles of a head are neighbours, as they read the same keys."""
    q0 = _places(q_low, 1)
    q1 = _places(q_high, 1)
    k0 = _places(k_low, STAGES)
    k1 = _places(k_high, STAGES)
    v0 = _places(k_low, STAGES)
    v1 = _places(k_high, STAGES)
    q_full = barriers(1)
    k_full = barriers(STAGES)
    k_empty = barriers(STAGES)
    v_full = barriers(STAGES)
    v_empty = barriers(STAGES)
    mbarrier.init(q_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=1)
    fence_async_shared()
    # With each partition but the first: its warps and their registers. The first has what is left.
    gl.warp_specialize(
        [
            (_attend, (q_low, q_high, tiles_ptr, out_ptr, stride, tiles, width, limit, q0.index(0),
                       q1.index(0), q_full.index(0), k0, k1, v0, v1, k_full, k_empty, v_full, v_empty,
                       D, KEYS, STAGES, FIELDS)),
            (_fetch, (k_low, k_high, tiles_ptr, tiles, width, k0, k1, v0, v1,
                      k_full, k_empty, v_full, v_empty, D, KEYS, STAGES, FIELDS)),
        ],
        [1],
        [24],
    )  # fmt: skip
