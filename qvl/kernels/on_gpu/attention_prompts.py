"""Attention of prompts over the paged cache for compute capability 9.0, in Gluon: which warps do what is said here.

One program takes a tile of 128 query rows against one KV head. One warp fetches keys and values by TMA, a block of the
cache at a time; two teams of four warps take 64 rows each, and both read what was fetched. They multiply in turn: left
alone, both would multiply at the same time and take exponentials at the same time. head_dim is 128, fetched as two
halves of 64: what TMA and the tensor cores take.

Keys that some rows may not see are at the end, and taken first. After them each row has seen a key, and the largest
score until then shifts all that follow (attention_turns.py).

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
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qvl.kernels.gpu import launch
from qvl.kernels.on_gpu.attention_pages import HALF, fetch, get, rows_of, tile_of, turns_of
from qvl.kernels.on_gpu.attention_turns import (
    LIMITS,
    LOG2E,
    NOTHING,
    add_values,
    attend_again,
    barriers,
    beyond,
    clear,
    part_sums,
    running,
    scores,
    seen,
    weigh,
)
from qvl.kernels.on_gpu.boxes import described, meet
from qvl.layers.attention import TILE_FIELDS as FIELDS
from qvl.layers.attention import Heads

HEAD_DIM = 128
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
    """q and out [n, heads, 128]; the cache already holds the keys of this step. The kernel launched next may begin
    before this one ends.
    """
    page = kv[0].shape[1]
    box = min(page, TEAM_ROWS.value), HALF.value
    slots = [cache.view(-1, heads.num_kv_heads * HEAD_DIM) for cache in kv]
    launch(
        _prompts, (work.shape[0] * heads.num_kv_heads,),
        *described(slots[0], box), *described(slots[1], box), q, table, work, out, table.stride(0),
        HEAD_DIM**-0.5 * LOG2E, LIMITS[q.dtype], KH=heads.num_kv_heads, GROUP=heads.group, PAGE=page,
        KEYS=KEYS, STAGES=STAGES, FIELDS=FIELDS, EARLY=True, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


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
def _queries(q_ptr, q0, q1, first_row, tokens, team: gl.constexpr, kv_head, KH: gl.constexpr, GROUP: gl.constexpr):
    """The team's rows to shared memory."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token, at_row = _rows_at(first_row, team, kv_head, KH, GROUP, gl.SliceLayout(1, L))
    at = q_ptr + at_row[:, None] + gl.arange(0, HALF, gl.SliceLayout(0, L))[None, :]
    live = (token < tokens)[:, None]
    q0.store(gl.load(at, mask=live, other=0.0))
    q1.store(gl.load(at + HALF, mask=live, other=0.0))
    fence_async_shared()
    meet()


@gluon.jit
def _rest(
    first, turns, team: gl.constexpr, shift, q0, q1, k0, k1, v0, v1, k_full, k_empty, v_full, v_empty, turn, acc0, acc1,
    scale, KEYS: gl.constexpr, STAGES: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """The turns whose keys all rows see: scores are shifted by what is known, and products go on beside the softmax."""
    at = first % STAGES
    mbarrier.wait(k_full.index(at), (first // STAGES) & 1)
    _wait_for_turn(turn, team, first)
    under_way = scores(q0, q1, k0.index(at), k1.index(at), KEYS, S)
    mbarrier.arrive(turn.index(1 - team))
    s = warpgroup_mma_wait(0, deps=(under_way,))
    mbarrier.arrive(k_empty.index(at))
    e = gl.exp2(s * scale - shift[:, None])
    parts = part_sums(e)
    weights = e.to(k0.dtype)
    following = first + 1
    mbarrier.wait(k_full.index(following % STAGES), (following // STAGES) & 1, pred=following < turns)
    for i in range(following, turns):
        at = i % STAGES
        last = (i - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((i - 1) // STAGES) & 1)
        _wait_for_turn(turn, team, i)
        under_way = scores(q0, q1, k0.index(at), k1.index(at), KEYS, S)
        next0, next1 = add_values(weights, v0.index(last), v1.index(last), acc0, acc1)
        mbarrier.arrive(turn.index(1 - team))
        weights, acc0, acc1, parts = weigh(
            under_way, next0, next1, weights, shift, scale, parts, k_empty.index(at), v_empty.index(last),
            k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, i + 1 < turns,
        )  # fmt: skip
    last = (turns - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((turns - 1) // STAGES) & 1)
    next0, next1 = add_values(weights, v0.index(last), v1.index(last), acc0, acc1)
    acc0, acc1, weights = warpgroup_mma_wait(0, deps=(next0, next1, weights))
    return acc0, acc1, parts


@gluon.jit
def _attend(
    team: gl.constexpr, k_box, v_box, q_ptr, table_ptr, work_ptr, out_ptr, table_stride, scale, limit,
    q0, q1, alone, k0, k1, v0, v1, k_full, k_empty, v_full, v_empty, turn,
    KH: gl.constexpr, GROUP: gl.constexpr, PAGE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    FIELDS: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 rows of the tile against all keys that they may see."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    seq, first_row, tokens, context, kv_head = tile_of(work_ptr, KH, FIELDS)
    turns = turns_of(tokens, context, KEYS)
    if turns > 0:
        _queries(q_ptr, q0, q1, first_row, tokens, team, kv_head, KH, GROUP)
        # Rows beyond the tile see what its last one sees.
        row = (team * TEAM_ROWS + gl.arange(0, TEAM_ROWS, gl.SliceLayout(1, S))) // GROUP
        last_key = context + gl.minimum(row, tokens - 1)
        stop = context + tokens
        acc0 = gl.zeros((TEAM_ROWS, HALF), gl.float32, A)
        acc1 = gl.zeros((TEAM_ROWS, HALF), gl.float32, A)

        total = gl.zeros((TEAM_ROWS,), gl.float32, gl.SliceLayout(1, S))
        shift = total + NOTHING
        # Keys that not every row may see are at the end, and so come first.
        masked = turns - gl.minimum(context // KEYS, turns - 1)
        for i in range(masked):
            at = i % STAGES
            phase = (i // STAGES) & 1
            first = (turns - 1 - i) * KEYS
            mbarrier.wait(k_full.index(at), phase)
            _wait_for_turn(turn, team, i)
            under_way = scores(q0, q1, k0.index(at), k1.index(at), KEYS, S)
            mbarrier.arrive(turn.index(1 - team))
            s = warpgroup_mma_wait(0, deps=(under_way,))
            mbarrier.arrive(k_empty.index(at))
            e, shift, total, acc0, acc1 = running(seen(s * scale, first, last_key), shift, total, acc0, acc1)
            mbarrier.wait(v_full.index(at), phase)
            if stop - first < KEYS:  # what lies behind the last key may be anything; both teams write the same
                clear(v0.index(at), stop - first)
                clear(v1.index(at), stop - first)
                fence_async_shared()
                meet()
            next0, next1 = add_values(e.to(q_ptr.dtype.element_ty), v0.index(at), v1.index(at), acc0, acc1)
            acc0, acc1 = warpgroup_mma_wait(0, deps=(next0, next1))
            mbarrier.arrive(v_empty.index(at))

        if masked < turns:
            acc0, acc1, parts = _rest(
                masked, turns, team, shift, q0, q1, k0, k1, v0, v1, k_full, k_empty, v_full, v_empty, turn,
                acc0, acc1, scale, KEYS, STAGES, S,
            )  # fmt: skip
            total += gl.convert_layout(gl.sum(parts, 1), gl.SliceLayout(1, S))
        if beyond(total, limit, tokens * GROUP - team * TEAM_ROWS):
            source = k_box, v_box, table_ptr + seq * table_stride, kv_head * (2 * HALF), stop, PAGE
            acc0, acc1, total = attend_again(
                _get_again, source, stop, last_key, q0, q1, alone, 0, scale, acc0, acc1, total
            )
        _store(out_ptr, first_row, tokens, team, kv_head, acc0, acc1, total, KH, GROUP)


@gluon.jit
def _get_again(values: gl.constexpr, source, start, full, to0, to1):
    """Keys or values from one of the sequence on, for `attend_again`."""
    k_box, v_box, table, column, stop, PAGE = source
    KEYS: gl.constexpr = to0.shape[0]
    BOX: gl.constexpr = k_box.block_shape[0]
    rows = rows_of(table, start, stop - 1, KEYS // BOX, PAGE, BOX)
    if values:
        get(v_box, rows, column, full, to0, to1, KEYS // BOX, BOX)
    else:
        get(k_box, rows, column, full, to0, to1, KEYS // BOX, BOX)


@gluon.jit
def _store(
    out_ptr, first_row, tokens, team: gl.constexpr, kv_head, acc0, acc1, total, KH: gl.constexpr, GROUP: gl.constexpr
):
    """Rows of the result that are of the tile."""
    L: gl.constexpr = acc0.type.layout
    over = (1 / gl.convert_layout(total, gl.SliceLayout(1, L)))[:, None]
    token, to_row = _rows_at(first_row, team, kv_head, KH, GROUP, gl.SliceLayout(1, L))
    to = out_ptr + to_row[:, None] + gl.arange(0, HALF, gl.SliceLayout(0, L))[None, :]
    live = (token < tokens)[:, None]
    gl.store(to, (acc0 * over).to(out_ptr.dtype.element_ty), mask=live)
    gl.store(to + HALF, (acc1 * over).to(out_ptr.dtype.element_ty), mask=live)


@gluon.jit(do_not_specialize=["table_stride"])
def _prompts(
    k_box, v_box,  # the cache as rows of tokens [slots, KH * 128], in boxes of a block and half a head
    q_ptr,  # [n, KH * GROUP, 128]
    table_ptr,  # int32 [b, table_stride]
    work_ptr,  # int32 [tiles, FIELDS]; of no tokens: there is no such tile
    out_ptr,  # as q
    table_stride,
    scale,
    limit,  # of LIMITS
    KH: gl.constexpr,
    GROUP: gl.constexpr,
    PAGE: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    FIELDS: gl.constexpr,
    EARLY: gl.constexpr,
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
    alone = barriers(TEAMS)
    for i in gl.static_range(TEAMS):
        mbarrier.init(turn.index(i), count=1)
        mbarrier.init(alone.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=TEAMS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=TEAMS)
    fence_async_shared()
    if EARLY:  # in this order: whoever runs beside this relies on what this has waited for
        gdc_wait()
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_attend, (0, k_box, v_box, q_ptr, table_ptr, work_ptr, out_ptr, table_stride, scale, limit, q0.index(0),
                       q1.index(0), alone.index(0), k0, k1, v0, v1, k_full, k_empty, v_full, v_empty, turn,
                       KH, GROUP, PAGE, KEYS, STAGES, FIELDS)),
            (_attend, (1, k_box, v_box, q_ptr, table_ptr, work_ptr, out_ptr, table_stride, scale, limit, q0.index(1),
                       q1.index(1), alone.index(1), k0, k1, v0, v1, k_full, k_empty, v_full, v_empty, turn,
                       KH, GROUP, PAGE, KEYS, STAGES, FIELDS)),
            (fetch, (k_box, v_box, table_ptr, work_ptr, table_stride, k0, k1, v0, v1,
                      k_full, k_empty, v_full, v_empty, KH, PAGE, KEYS, STAGES, FIELDS)),
        ],
        [4, 1],  # warps of the second team and of the fetching
        [232, 40],  # and their registers; the first team takes what is left: 240
    )  # fmt: skip
