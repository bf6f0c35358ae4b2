"""Attention of prompts over the paged cache for compute capability 9.0, in Gluon: which warps do what is said here.

One program takes a tile of 128 query rows against one KV head. One warp fetches keys and values by TMA, a block of the
cache at a time; two teams of four warps take 64 rows each, and both read what was fetched. They multiply in turn: left
alone, both would multiply at the same time and take exponentials at the same time. head_dim is 128, fetched as two
halves of 64: what TMA and the tensor cores take.

Knows the block layout. Does not know how a step is planned. Importing this file imports Triton;
`qvl.kernels.attention` does so only where such a GPU is.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qvl.kernels.gpu import launch
from qvl.kernels.triton_boxes import described, meet
from qvl.kernels.triton_turns import LOG2E, barriers, clear, scores
from qvl.layers.attention import TILE_FIELDS as FIELDS
from qvl.layers.attention import Heads

HEAD_DIM = 128
HALF = gl.constexpr(64)
TEAM_ROWS = gl.constexpr(64)  # query rows of four warps
TEAMS = gl.constexpr(2)  # of four warps
ROWS = 128  # query rows of a program
LONG = 1024  # keys from which on it is faster than the kernel for every GPU
KEYS = 128  # keys a turn
STAGES = 2  # turns of keys, and of values, that are fetched ahead
REGISTERS = 168  # of a thread at the start: one program fits; then the teams take those of the fetching


def takes(block_size: int, longest: int) -> bool:
    """Whether it is the faster one for such a context, and blocks can be fetched: some whole ones are a turn, and TMA
    swizzles eight rows.
    """
    return longest >= LONG and block_size % 8 == 0 and KEYS % block_size == 0


def attend_prompts(
    q: Tensor, kv: tuple[Tensor, Tensor], table: Tensor, work: Tensor, out: Tensor, heads: Heads
) -> None:
    """q and out [n, heads, 128]; the cache already holds the keys of this step."""
    page = kv[0].shape[1]
    box = page, HALF.value
    slots = [cache.view(-1, heads.num_kv_heads * HEAD_DIM) for cache in kv]
    launch(
        _prompts, (work.shape[0] * heads.num_kv_heads,),
        *described(slots[0], box), *described(slots[1], box), q, table, work, out, table.stride(0),
        HEAD_DIM**-0.5 * LOG2E, KH=heads.num_kv_heads, GROUP=heads.group, PAGE=page, KEYS=KEYS, STAGES=STAGES,
        FIELDS=FIELDS, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


@gluon.jit
def _tile(work_ptr, KH: gl.constexpr, FIELDS: gl.constexpr):
    """(sequence, first row of the step, tokens, context before them, KV head) of this program."""
    tile = work_ptr + gl.program_id(0) // KH * FIELDS
    return gl.load(tile), gl.load(tile + 1), gl.load(tile + 2), gl.load(tile + 3), gl.program_id(0) % KH


@gluon.jit
def _turns(tokens, context, KEYS: gl.constexpr):
    """Turns of keys; none for a tile of no tokens, which is no tile."""
    return gl.where(tokens > 0, gl.cdiv(context + tokens, KEYS), 0)


@gluon.jit
def _rows_of(table, first, end, COUNT: gl.constexpr, PAGE: gl.constexpr):
    """Where blocks of keys begin in the cache; all looked up before one is used."""
    rows = (gl.load(table + gl.minimum(first, end) // PAGE) * PAGE,)
    for j in gl.static_range(1, COUNT):
        row = gl.load(table + gl.minimum(first + j * PAGE, end) // PAGE) * PAGE
        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
    return rows


@gluon.jit
def _blocks(box, low, high, full, rows, column, COUNT: gl.constexpr, PAGE: gl.constexpr):
    for j in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(box, [rows[j], column], full, low.slice(j * PAGE, PAGE, 0))
        tma.async_copy_global_to_shared(box, [rows[j], column + HALF], full, high.slice(j * PAGE, PAGE, 0))


@gluon.jit
def _fetch(
    k_box, v_box, table_ptr, work_ptr, table_stride, k0, k1, v0, v1, k_full, k_empty, v_full, v_empty,
    KH: gl.constexpr, PAGE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr,
):  # fmt: skip
    """One warp: the keys and values that the tile may see, from their end to their beginning.

    Past the end stands the last block again: one that belongs to another may hold what is not a number.
    """
    seq, _first_row, tokens, context, kv_head = _tile(work_ptr, KH, FIELDS)
    turns = _turns(tokens, context, KEYS)
    table = table_ptr + seq * table_stride
    column = kv_head * (2 * HALF)
    COUNT: gl.constexpr = KEYS // PAGE
    for i in range(turns):
        at = i % STAGES
        phase = (i // STAGES) & 1
        rows = _rows_of(table, (turns - 1 - i) * KEYS, context + tokens - 1, COUNT, PAGE)
        mbarrier.wait(k_empty.index(at), phase ^ 1)
        mbarrier.expect(k_full.index(at), KEYS * HALF * 4)
        _blocks(k_box, k0.index(at), k1.index(at), k_full.index(at), rows, column, COUNT, PAGE)
        mbarrier.wait(v_empty.index(at), phase ^ 1)
        mbarrier.expect(v_full.index(at), KEYS * HALF * 4)
        _blocks(v_box, v0.index(at), v1.index(at), v_full.index(at), rows, column, COUNT, PAGE)


@gluon.jit
def _rows_at(first_row, team: gl.constexpr, kv_head, KH: gl.constexpr, GROUP: gl.constexpr, L: gl.constexpr):
    """(token of the tile, element of q and out) of each row of a team: row r is head r % GROUP of token r // GROUP."""
    row = team * TEAM_ROWS + gl.arange(0, TEAM_ROWS, L)
    token = row // GROUP
    return token, ((first_row + token).to(gl.int64) * (KH * GROUP) + kv_head * GROUP + row % GROUP) * (2 * HALF)


@gluon.jit
def _wait_for_turn(turn, team: gl.constexpr, i):
    """Until the other team has begun its products: those of turn i - 1 for the first team, of turn i for the second."""
    mbarrier.wait(turn.index(team), (i & 1) ^ (1 - team))


@gluon.jit
def _turn(
    i, turns, team: gl.constexpr, last_key, q0, q1, k0, k1, v0, v1, k_full, k_empty, v_full, v_empty, turn, weights,
    acc0, acc1, best, total, scale, masked,
    KEYS: gl.constexpr, STAGES: gl.constexpr, S: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """The scores of these keys and the weights of those before times their values, at the same time."""
    at = i % STAGES
    last = (i - 1) % STAGES
    mbarrier.wait(k_full.index(at), (i // STAGES) & 1)
    mbarrier.wait(v_full.index(last), ((i - 1) // STAGES) & 1)
    _wait_for_turn(turn, team, i)
    under_way = scores(q0, q1, k0.index(at), k1.index(at), KEYS, S)
    w = gl.convert_layout(weights, gl.DotOperandLayout(0, A, 2))
    next0 = warpgroup_mma(w, v0.index(last), acc0, is_async=True)
    next1 = warpgroup_mma(w, v1.index(last), acc1, is_async=True)
    mbarrier.arrive(turn.index(1 - team))
    s = warpgroup_mma_wait(2, deps=(under_way,))
    mbarrier.arrive(k_empty.index(at))
    if masked:
        key = (turns - 1 - i) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, S))
        s = gl.where(key[None, :] <= last_key[:, None], s, -1e30)
    new = gl.maximum(best, gl.max(s, 1) * scale)
    e = gl.exp2(s * scale - new[:, None])
    fade = gl.exp2(best - new)
    total = total * fade + gl.sum(e, 1)
    weights = e.to(weights.dtype)
    acc0, acc1, w = warpgroup_mma_wait(0, deps=(next0, next1, w))
    mbarrier.arrive(v_empty.index(last))
    f = gl.convert_layout(fade, gl.SliceLayout(1, A))[:, None]
    return weights, acc0 * f, acc1 * f, new, total


@gluon.jit
def _attend(
    team: gl.constexpr, q_ptr, work_ptr, out_ptr, scale, q0, q1, k0, k1, v0, v1, k_full, k_empty, v_full, v_empty, turn,
    KH: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 rows of the tile against all keys that they may see."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    _seq, first_row, tokens, context, kv_head = _tile(work_ptr, KH, FIELDS)
    turns = _turns(tokens, context, KEYS)
    stop = context + tokens
    if turns > 0:
        token, at_row = _rows_at(first_row, team, kv_head, KH, GROUP, gl.SliceLayout(1, B))
        column = gl.arange(0, HALF, gl.SliceLayout(0, B))
        live = (token < tokens)[:, None]
        q_at = q_ptr + at_row[:, None] + column[None, :]
        q0.store(gl.load(q_at, mask=live, other=0.0))
        q1.store(gl.load(q_at + HALF, mask=live, other=0.0))
        fence_async_shared()
        meet()

        # Rows beyond the tile see what its last one sees.
        seen = (team * TEAM_ROWS + gl.arange(0, TEAM_ROWS, gl.SliceLayout(1, S))) // GROUP
        last_key = context + gl.minimum(seen, tokens - 1)
        first = (turns - 1) * KEYS
        mbarrier.wait(k_full.index(0), 0)
        _wait_for_turn(turn, team, 0)
        under_way = scores(q0, q1, k0.index(0), k1.index(0), KEYS, S)
        mbarrier.arrive(turn.index(1 - team))
        s = warpgroup_mma_wait(0, deps=(under_way,))
        mbarrier.arrive(k_empty.index(0))
        s = gl.where((first + gl.arange(0, KEYS, gl.SliceLayout(0, S)))[None, :] <= last_key[:, None], s, -1e30)
        best = gl.max(s, 1) * scale
        e = gl.exp2(s * scale - best[:, None])
        total = gl.sum(e, 1)
        weights = e.to(q_ptr.dtype.element_ty)
        acc0 = gl.zeros((TEAM_ROWS, HALF), gl.float32, A)
        acc1 = gl.zeros((TEAM_ROWS, HALF), gl.float32, A)
        mbarrier.wait(v_full.index(0), 0)
        if stop - first < KEYS:  # what lies behind the last key may be anything; both teams write the same
            clear(v0.index(0), stop - first)
            clear(v1.index(0), stop - first)
            fence_async_shared()
            meet()

        # Keys that not every row may see are at the end, and so come first.
        masked = turns - gl.minimum((context + 1) // KEYS, turns - 1)
        for i in range(1, turns):
            weights, acc0, acc1, best, total = _turn(
                i, turns, team, last_key, q0, q1, k0, k1, v0, v1, k_full, k_empty, v_full, v_empty, turn, weights,
                acc0, acc1, best, total, scale, i < masked, KEYS, STAGES, S, A,
            )  # fmt: skip

        last = (turns - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((turns - 1) // STAGES) & 1)
        w = gl.convert_layout(weights, gl.DotOperandLayout(0, A, 2))
        acc0 = warpgroup_mma(w, v0.index(last), acc0)
        acc1 = warpgroup_mma(w, v1.index(last), acc1)
        over = (1 / gl.convert_layout(total, gl.SliceLayout(1, A)))[:, None]
        of_row, to_row = _rows_at(first_row, team, kv_head, KH, GROUP, gl.SliceLayout(1, A))
        to = out_ptr + to_row[:, None] + gl.arange(0, HALF, gl.SliceLayout(0, A))[None, :]
        valid = (of_row < tokens)[:, None]
        gl.store(to, (acc0 * over).to(out_ptr.dtype.element_ty), mask=valid)
        gl.store(to + HALF, (acc1 * over).to(out_ptr.dtype.element_ty), mask=valid)


@gluon.jit(do_not_specialize=["table_stride"])
def _prompts(
    k_box, v_box,  # the cache as rows of tokens [slots, KH * 128], in boxes of a block and half a head
    q_ptr,  # [n, KH * GROUP, 128]
    table_ptr,  # int32 [b, table_stride]
    work_ptr,  # int32 [tiles, FIELDS]; of no tokens: there is no such tile
    out_ptr,  # as q
    table_stride,
    scale,
    KH: gl.constexpr,
    GROUP: gl.constexpr,
    PAGE: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    FIELDS: gl.constexpr,
):  # fmt: skip
    """One program: one tile and the GROUP query heads of one KV head."""
    L: gl.constexpr = k_box.layout
    q0 = gl.allocate_shared_memory(k_box.dtype, [TEAMS, TEAM_ROWS, HALF], L)
    q1 = gl.allocate_shared_memory(k_box.dtype, [TEAMS, TEAM_ROWS, HALF], L)
    k0 = gl.allocate_shared_memory(k_box.dtype, [STAGES, KEYS, HALF], L)
    k1 = gl.allocate_shared_memory(k_box.dtype, [STAGES, KEYS, HALF], L)
    v0 = gl.allocate_shared_memory(k_box.dtype, [STAGES, KEYS, HALF], L)
    v1 = gl.allocate_shared_memory(k_box.dtype, [STAGES, KEYS, HALF], L)
    k_full = barriers(STAGES)
    k_empty = barriers(STAGES)
    v_full = barriers(STAGES)
    v_empty = barriers(STAGES)
    turn = barriers(TEAMS)
    for i in gl.static_range(TEAMS):
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=TEAMS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=TEAMS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (0, q_ptr, work_ptr, out_ptr, scale, q0.index(0), q1.index(0), k0, k1, v0, v1,
                       k_full, k_empty, v_full, v_empty, turn, KH, GROUP, KEYS, STAGES, FIELDS)),
            (_attend, (1, q_ptr, work_ptr, out_ptr, scale, q0.index(1), q1.index(1), k0, k1, v0, v1,
                       k_full, k_empty, v_full, v_empty, turn, KH, GROUP, KEYS, STAGES, FIELDS)),
            (_fetch, (k_box, v_box, table_ptr, work_ptr, table_stride, k0, k1, v0, v1,
                      k_full, k_empty, v_full, v_empty, KH, PAGE, KEYS, STAGES, FIELDS)),
        ],
        [4, 1],  # warps of the second team and of the fetching
        [240, 24],  # and their registers; the first team takes what is left: 240
    )  # fmt: skip
