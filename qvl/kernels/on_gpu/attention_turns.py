"""What attention by teams of four warps is made of, in Gluon: the products and the weights of a turn of keys.

A softmax may be shifted by any number: a row's maximum is subtracted only to keep exponentials in range. So the kernels
shift all weights of a row by the maximum of its first keys (`running`): then no turn searches for a maximum, no thread
waits for another, and nothing computed is scaled again. The sum of the weights cannot vanish, as the first keys are in
it; but where a later score is far larger, it overflows. `beyond` sees that, and the kernel computes the tile once more
with a running maximum.

Knows tiles of scores, weights and values. Does not know where they come from. Importing this file imports Triton.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qvl.kernels.on_gpu.boxes import meet

LOG2E = 1.4426950408889634
NOTHING = gl.constexpr(-1e30)  # the score of a key that a row may not see
MARGIN = gl.constexpr(10.0)  # the largest weight of the first keys is 2**-10: there is room for larger ones
LIMITS = {torch.bfloat16: 2.0**64, torch.float16: 2.0**15}  # of a row's sum: below it each weight is in range


@gluon.jit
def barriers(count: gl.constexpr):
    return gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())


@gluon.jit
def scores(q0, q1, k0, k1, KEYS: gl.constexpr, S: gl.constexpr):
    """Queries times keys, under way; each in two parts of head_dim."""
    ROWS: gl.constexpr = q0.shape[0]
    s = gl.zeros((ROWS, KEYS), gl.float32, S)
    s = warpgroup_mma(q0, k0.permute((1, 0)), s, use_acc=False, is_async=True)
    return warpgroup_mma(q1, k1.permute((1, 0)), s, is_async=True)


@gluon.jit
def add_values(weights, v0, v1, acc0, acc1):
    """Weights times values added to what was summed, under way."""
    w0 = gl.convert_layout(weights, gl.DotOperandLayout(0, acc0.type.layout, 2))
    w1 = gl.convert_layout(weights, gl.DotOperandLayout(0, acc1.type.layout, 2))
    return warpgroup_mma(w0, v0, acc0, is_async=True), warpgroup_mma(w1, v1, acc1, is_async=True)


@gluon.jit
def clear(values, live):
    """Zeros from row `live` on: what lies behind the last key may be anything, and 0 * nan is nan."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    row = gl.arange(0, values.shape[0], gl.SliceLayout(1, L))
    old = values.load(L)
    values.store(gl.where((row < live)[:, None], old, gl.zeros_like(old)))


@gluon.jit
def seen(s, first, last_key):
    """Scores of the keys from `first` on, of those that a row may see."""
    key = first + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    return gl.where(key[None, :] <= last_key[:, None], s, NOTHING)


@gluon.jit
def running(s, shift, total, acc0, acc1):
    """Scores to weights by the largest score of a row until now: (weights, their shift, and what was summed before
    these, in the same measure).
    """
    new = gl.maximum(shift, gl.max(s, 1) + MARGIN)
    fade = gl.exp2(shift - new)
    f0 = gl.convert_layout(fade, gl.SliceLayout(1, acc0.type.layout))[:, None]
    f1 = gl.convert_layout(fade, gl.SliceLayout(1, acc1.type.layout))[:, None]
    e = gl.exp2(s - new[:, None])
    return e, new, total * fade + gl.sum(e, 1), acc0 * f0, acc1 * f1


@gluon.jit
def part_sums(e):
    """Of a row, what each thread holds: [rows, 8]."""
    return gl.sum(e.reshape([e.shape[0], e.shape[1] // 8, 8]), 1)


@gluon.jit
def weigh(under_way, next0, next1, weights, shift, scale, parts, k_empty, v_empty, k_full, phase, more):
    """The end of a turn with a fixed shift, whose scores and the values of the turn before are under way: (its weights,
    what values were added to, sums of weights). Places of both are given back; `more`: the next keys are waited for.
    """
    s = warpgroup_mma_wait(2, deps=(under_way,))
    mbarrier.arrive(k_empty)
    e = gl.exp2(s * scale - shift[:, None])
    parts += part_sums(e)
    # Stands between the softmax and the end of the products, which the assembler would else wait for first.
    mbarrier.wait(k_full, phase, pred=more)
    acc0, acc1, weights = warpgroup_mma_wait(0, deps=(next0, next1, weights))
    mbarrier.arrive(v_empty)
    return e.to(weights.dtype), acc0, acc1, parts


@gluon.jit
def beyond(total, limit, live):
    """Whether the sum of one of the first `live` rows reached the limit, or is not a number."""
    row = gl.arange(0, total.shape[0], total.type.layout)
    return gl.max(gl.where((row >= live) | (total < limit), 0, 1), 0) > 0


@gluon.jit
def attend_again(
    get: gl.constexpr, source, stop, last_key, x0, x1, full, phase: gl.constexpr, scale, acc0, acc1, total
):  # fmt: skip
    """What a tile attends to with a running maximum, slowly: the team fetches for itself, to where its queries were.
    (Sums of weighted values in two parts, sums of weights.)

    `get` fetches keys or values of a `source`; `full` was waited for an even (`phase` 0) or odd number of times.
    """
    KEYS: gl.constexpr = x0.shape[0]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    a0 = x0.load(gl.DotOperandLayout(0, S, 2))
    a1 = x1.load(gl.DotOperandLayout(0, S, 2))
    mine = gl.convert_layout(last_key, gl.SliceLayout(1, S))
    summed = gl.zeros((KEYS,), gl.float32, gl.SliceLayout(1, S))
    best = summed + NOTHING
    acc0 = gl.zeros_like(acc0)
    acc1 = gl.zeros_like(acc1)
    for start in range(0, stop, KEYS):
        meet()
        get(False, source, start, full, x0, x1)
        mbarrier.wait(full, phase)
        s = warpgroup_mma_wait(0, deps=(scores(a0, a1, x0, x1, KEYS, S),))
        meet()
        get(True, source, start, full, x0, x1)
        e, best, summed, acc0, acc1 = running(seen(s * scale, start, mine), best, summed, acc0, acc1)
        mbarrier.wait(full, 1 - phase)
        if start + KEYS > stop:
            clear(x0, stop - start)
            clear(x1, stop - start)
            fence_async_shared()
            meet()
        acc0, acc1 = warpgroup_mma_wait(0, deps=add_values(e.to(x0.dtype), x0, x1, acc0, acc1))
    return acc0, acc1, gl.convert_layout(summed, total.type.layout)
