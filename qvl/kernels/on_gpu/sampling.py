"""The choice of tokens on a GPU without sorting: a few passes over the scores, each by many programs, in Triton.

    scan     rows with rules: penalties, bias, bans, then the best of all, with noise or without
             where filters count: largest, smallest and summed weight of every part
    narrow   twice: weights beyond 16 pivots, so that 289 intervals are told apart
    gather   what lies above the interval of the threshold is kept: the best of it; what lies in it goes to a list
    choose   the exact threshold among the list, ties by token id; the best of what is kept -> tokens

Nothing is left to chance or to the order of programs: a row gives the same token in any company. Knows tensors and how
rules are laid out (`FIELDS`). Importing this file imports Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels import rules as layout
from qvl.kernels.gpu import cdiv, launch, next_power_of_2
from qvl.kernels.on_gpu.sampling_scores import (
    BLOCK,
    BROKEN,
    FAILED,
    NONE,
    WARPS,
    best,
    best_key,
    id_bits,
    key_of,
    number_at,
    score_of,
    scores_of,
    token_of,
    with_noise,
)
from qvl.kernels.rules import Rules

__all__ = ["best", "choose"]

KIND, TOP_K = tl.constexpr(layout.KIND), tl.constexpr(layout.TOP_K)
SCALE, TOP_P, LOG_MIN_P = (tl.constexpr(f) for f in (layout.SCALE, layout.TOP_P, layout.LOG_MIN_P))
INDEX, LINE, FIELDS = tl.constexpr(layout.INDEX), tl.constexpr(layout.LINE), tl.constexpr(layout.FIELDS)
FREE, FILTERED = tl.constexpr(layout.FREE), tl.constexpr(layout.FILTERED)

PIVOTS = tl.constexpr(16)
ROUNDS = tl.constexpr(2)
LISTED = tl.constexpr(4096)  # candidates that a row's list takes; if there are more, its last program reads all scores
AT_A_TIME = 2048  # candidates that it holds
PROGRAMS = 1024  # that share the parts of all rows, where each has to find out about its row first
UNIT = tl.constexpr(float(1 << 40))  # weights are summed as integers where the order of terms is not fixed
LOG2E = tl.constexpr(1.4426950408889634)


def choose(logits: Tensor, allowed: Tensor, rules: Rules, scratch: Scratch, healthy: Tensor, tokens: Tensor) -> None:
    """Write the tokens of the rows with rules into `tokens` int64 [m], and count them where they are counted.

    Rows that are -1 in `healthy` int64 [m] stay so.
    """
    rows, vocab = rules.rows, logits.shape[1]
    parts = cdiv(vocab, BLOCK)
    source = (logits, allowed, rules.words, rules.counts)
    ends = (scratch.keys, scratch.listed, scratch.candidates)
    sizes = {"PARTS": next_power_of_2(parts), "ID_BITS": id_bits(vocab)}
    launch(_scan, (rows, parts), *source, scratch.stats, scratch.keys, scratch.listed, vocab, parts,
           ID_BITS=sizes["ID_BITS"], BLOCK=BLOCK, num_warps=WARPS)  # fmt: skip
    found = (scratch.stats, scratch.pivots, scratch.weights)
    few = (rows, min(parts, cdiv(PROGRAMS, rows)))
    for number in range(ROUNDS.value if rules.narrows else 0):
        launch(_narrow, few, *source, *found, vocab, parts, ROUND=number, PARTS=sizes["PARTS"], BLOCK=BLOCK,
               num_warps=WARPS)  # fmt: skip
    if rules.filters:
        launch(_gather, few, *source, *found, *ends, vocab, parts, **sizes, BLOCK=BLOCK, num_warps=WARPS, maxnreg=128)
    launch(_choose, (rows,), *source, *found, *ends, healthy, tokens, vocab, parts, **sizes, BLOCK=AT_A_TIME,
           num_warps=8)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scratch:
    """What the passes leave for each other: the best key of every part; largest, smallest and summed weight of every
    part; pivots, and the weights beyond them in every part; how many candidates are listed, and their keys.
    """

    rows: int
    keys: Tensor
    stats: Tensor
    pivots: Tensor
    weights: Tensor
    listed: Tensor
    candidates: Tensor

    @classmethod
    def create(cls, rows: int, vocab: int, device: torch.device) -> Scratch:
        """For up to so many rows with rules."""
        parts = cdiv(vocab, BLOCK)
        return cls(
            rows,
            keys=torch.empty((rows, parts), dtype=torch.int64, device=device),
            stats=torch.empty((rows, 3, parts), dtype=torch.float32, device=device),
            pivots=torch.empty((rows, ROUNDS.value, PIVOTS.value), dtype=torch.float32, device=device),
            weights=torch.empty((rows, ROUNDS.value, PIVOTS.value, parts), dtype=torch.float32, device=device),
            listed=torch.empty(rows, dtype=torch.int32, device=device),
            candidates=torch.empty((rows, LISTED.value), dtype=torch.int64, device=device),
        )


# --- passes -----------------------------------------------------------------------------------------------------------


@triton.jit
def _scan(
    logits_ptr, allowed_ptr, rules_ptr, counts_ptr, stats_ptr, keys_ptr, listed_ptr, vocab, parts,
    ID_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one part of one row with rules."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rule = rules_ptr + row * FIELDS
    kind = tl.load(rule + KIND)
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = scores_of((logits_ptr, allowed_ptr, rules_ptr, rule, counts_ptr), at, vocab)
    if kind == FILTERED:
        top = tl.max(x, 0)
        stats = stats_ptr + row * 3 * parts + part
        tl.store(stats, top)
        tl.store(stats + parts, tl.min(tl.where(x == -float("inf"), float("inf"), x), 0))
        top = tl.where(top == -float("inf"), 0.0, top)
        tl.store(stats + 2 * parts, tl.sum(tl.exp2((x - top) * (LOG2E * number_at(rule + SCALE))), 0))
        if part == 0:
            tl.store(listed_ptr + row, 0)
    else:
        if kind == FREE:
            x = with_noise(x, at, rule)
        tl.store(keys_ptr + row * parts + part, best_key(x, at, ID_BITS))


@triton.jit
def _range(stats_ptr, rule, row, parts, vocab, PARTS: tl.constexpr):
    """Of a row: its largest score, the smallest that may be kept, the weight that top_k or top_p asks for."""
    part = tl.arange(0, PARTS)
    live = part < parts
    stats = stats_ptr + row * 3 * parts + part
    tops = tl.load(stats, mask=live, other=-float("inf"))
    low = tl.min(tl.load(stats + parts, mask=live, other=float("inf")), 0)
    top = tl.max(tops, 0)
    scale, top_p = number_at(rule + SCALE), number_at(rule + TOP_P)
    shares = tl.where(tops == -float("inf"), 0.0, tl.exp2((tops - top) * (LOG2E * scale)))
    weight = top_p * tl.sum(tl.load(stats + 2 * parts, mask=live, other=0.0) * shares, 0)
    top_k = tl.load(rule + TOP_K)
    if top_k > 0:
        weight = top_k.to(tl.float32)
    elif top_p < 1.0:
        # All tokens further below the best together weigh less than what top_p leaves out.
        low = tl.maximum(low, top - (1.0 + tl.log(vocab / (1.0 - top_p))) / scale)
    return top, low, weight


@triton.jit
def _interval(pivots_ptr, weights_ptr, row, parts, low, wanted, DONE: tl.constexpr, PARTS: tl.constexpr):
    """After DONE rounds: the scores [low, high) of which one is the last that is kept, and the weight from high on."""
    high = float("inf")
    beyond = 0.0
    pivot = tl.arange(0, PIVOTS)
    part = tl.arange(0, PARTS)
    for number in tl.static_range(DONE):
        lines = (row * ROUNDS + number) * PIVOTS + pivot
        pivots = tl.load(pivots_ptr + lines)
        places = lines[:, None] * parts + part[None, :]
        weights = tl.sum(tl.load(weights_ptr + places, mask=(part < parts)[None, :], other=0.0), 1)
        # From pivot `last` on they weigh too much for anything below it to be kept, from the next one on too little.
        last = tl.max(tl.where(weights >= wanted, pivot, -1), 0)
        low = tl.where(last >= 0, tl.sum(tl.where(pivot == last, pivots, 0.0), 0), low)
        above = last + 1 < PIVOTS
        high = tl.where(above, tl.sum(tl.where(pivot == last + 1, pivots, 0.0), 0), high)
        beyond = tl.where(above, tl.sum(tl.where(pivot == last + 1, weights, 0.0), 0), beyond)
    return low, high, beyond


@triton.jit
def _likely(x, top, rule):
    """What min_p leaves, and may be chosen at all."""
    return ((x - top) * number_at(rule + SCALE) >= number_at(rule + LOG_MIN_P)) & (x > -float("inf"))


@triton.jit
def _narrow(
    logits_ptr, allowed_ptr, rules_ptr, counts_ptr, stats_ptr, pivots_ptr, weights_ptr, vocab,
    parts, ROUND: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: some parts of one row; how many of their tokens, or how much weight, lie beyond each pivot."""
    row = tl.program_id(0).to(tl.int64)
    rule = rules_ptr + row * FIELDS
    top_k = tl.load(rule + TOP_K)
    if (tl.load(rule + KIND) == FILTERED) & ((top_k > 0) | (number_at(rule + TOP_P) < 1.0)):
        top, low, wanted = _range(stats_ptr, rule, row, parts, vocab, PARTS)
        low, high, _beyond = _interval(pivots_ptr, weights_ptr, row, parts, low, wanted, ROUND, PARTS)
        slot = tl.arange(0, PIVOTS)
        share = (slot + 1).to(tl.float32) / (PIVOTS + 1)
        pivots = low * (1.0 - share) + tl.minimum(high, top) * share
        lines = (row * ROUNDS + ROUND) * PIVOTS + slot
        if tl.program_id(1) == 0:
            tl.store(pivots_ptr + lines, pivots)
        rate = LOG2E * number_at(rule + SCALE)
        for part in range(tl.program_id(1), parts, tl.num_programs(1)):
            at = part * BLOCK + tl.arange(0, BLOCK)
            x = scores_of((logits_ptr, allowed_ptr, rules_ptr, rule, counts_ptr), at, vocab)
            weight = tl.where(top_k > 0, 1.0, tl.exp2((x - top) * rate))
            sums = tl.sum(tl.where(x[None, :] >= pivots[:, None], weight[None, :], 0.0), 1)
            tl.store(weights_ptr + lines * parts + part, sums)


@triton.jit
def _gather(
    logits_ptr, allowed_ptr, rules_ptr, counts_ptr, stats_ptr, pivots_ptr, weights_ptr, keys_ptr,
    listed_ptr, candidates_ptr, vocab, parts, PARTS: tl.constexpr, ID_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: some parts of one row; the best of what is kept for sure, and a list of what may be."""
    row = tl.program_id(0).to(tl.int64)
    rule = rules_ptr + row * FIELDS
    if tl.load(rule + KIND) == FILTERED:
        top, low, wanted = _range(stats_ptr, rule, row, parts, vocab, PARTS)
        high = -float("inf")
        top_k, top_p = tl.load(rule + TOP_K), number_at(rule + TOP_P)
        if (top_k > 0) | (top_p < 1.0):
            low, high, _beyond = _interval(pivots_ptr, weights_ptr, row, parts, low, wanted, ROUNDS, PARTS)
            if (top_k > 0) & (top_p < 1.0):
                high = float("inf")  # what top_p takes of them is not known yet
        for part in range(tl.program_id(1), parts, tl.num_programs(1)):
            at = part * BLOCK + tl.arange(0, BLOCK)
            x = scores_of((logits_ptr, allowed_ptr, rules_ptr, rule, counts_ptr), at, vocab)
            sure = (x >= high) & _likely(x, top, rule)
            key = tl.full([], NONE, tl.int64)
            if tl.max(sure.to(tl.int32), 0) == 1:
                key = best_key(tl.where(sure, with_noise(x, at, rule), -float("inf")), at, ID_BITS)
            tl.store(keys_ptr + row * parts + part, key)
            open_ = ((x >= low) & (x < high)).to(tl.int32)
            count = tl.sum(open_, 0)
            if count > 0:
                place = tl.atomic_add(listed_ptr + row, count) + tl.cumsum(open_, 0) - open_
                here = (open_ == 1) & (place < LISTED)
                tl.store(candidates_ptr + row * LISTED + place, key_of(x, at, ID_BITS), mask=here)


@triton.jit
def _candidates(row, at, ID_BITS: tl.constexpr):
    """Keys of the candidates `at`: those that are listed, or of the whole row what lies in [low, high); else NONE."""
    source, candidates_ptr, count, low, high, vocab = row
    if count <= LISTED:
        key = tl.load(candidates_ptr + at, mask=at < count, other=NONE)
    else:
        x = scores_of(source, at, vocab)
        key = tl.where((x >= low) & (x < high), key_of(x, at, ID_BITS), NONE)
    return key


@triton.jit
def _weight_beyond(limit, counted, top, rate, row, ID_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """What candidates with keys above `limit` weigh together, in UNITs, or how many they are, if `counted`; the largest
    key up to `limit`, and the smallest above it.
    """
    _source, _candidates_ptr, count, _low, _high, vocab = row
    total = tl.zeros([BLOCK], tl.int64)
    under = tl.full([BLOCK], NONE, tl.int64)
    over = tl.full([BLOCK], BROKEN, tl.int64)
    for start in range(0, tl.where(count > LISTED, vocab, count), BLOCK):
        key = _candidates(row, start + tl.arange(0, BLOCK), ID_BITS)
        x = tl.where(key > limit, score_of(key, ID_BITS), -float("inf"))
        weight = tl.where(counted, 1.0, tl.exp2((x - top) * rate)) * UNIT
        total += tl.where(key > limit, weight, 0.0).to(tl.int64)
        under = tl.maximum(under, tl.where(key > limit, NONE, key))
        over = tl.minimum(over, tl.where(key > limit, key, BROKEN))
    return tl.sum(total, 0), tl.max(under, 0), tl.min(over, 0)


@triton.jit
def _choose(
    logits_ptr, allowed_ptr, rules_ptr, counts_ptr, stats_ptr, pivots_ptr, weights_ptr, keys_ptr,
    listed_ptr, candidates_ptr, healthy_ptr, tokens_ptr, vocab, parts, PARTS: tl.constexpr, ID_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row. Bisects the keys of its candidates where the threshold is not known yet."""
    row = tl.program_id(0).to(tl.int64)
    rule = rules_ptr + row * FIELDS
    part = tl.arange(0, PARTS)
    found = tl.max(tl.load(keys_ptr + row * parts + part, mask=part < parts, other=NONE), 0)
    top_k, top_p = tl.load(rule + TOP_K), number_at(rule + TOP_P)
    if (tl.load(rule + KIND) == FILTERED) & ((top_k > 0) | (top_p < 1.0)):
        source = (logits_ptr, allowed_ptr, rules_ptr, rule, counts_ptr)
        candidates_ptr += row * LISTED
        top, low, wanted = _range(stats_ptr, rule, row, parts, vocab, PARTS)
        low, high, beyond = _interval(pivots_ptr, weights_ptr, row, parts, low, wanted, ROUNDS, PARTS)
        count = tl.load(listed_ptr + row)
        rate = LOG2E * number_at(rule + SCALE)
        both = (top_k > 0) & (top_p < 1.0)
        if both:
            high = float("inf")
            beyond = 0.0
        listed = (source, candidates_ptr, count, low, high, vocab)
        zero = tl.full([], 0, tl.int32)
        rest = ((wanted - beyond) * UNIT).to(tl.int64)
        # Kept is every key whose betters weigh less than the rest: those from `last` on, which lies in (below, last].
        below = key_of(low, zero, ID_BITS) - (1 << ID_BITS)
        last = key_of(top, zero, ID_BITS)
        for step in range(tl.where(both, 2, 1)):
            counted = (top_k > 0) & (step == 0)
            if step == 1:
                weight, _under, _over = _weight_beyond(below, counted, top, rate, listed, ID_BITS, BLOCK)
                rest = (top_p * weight.to(tl.float32)).to(tl.int64)
                last = key_of(top, zero, ID_BITS)
            rest = tl.maximum(rest, 1)
            while last - below > 1:
                middle = below + (last - below) // 2
                weight, under, over = _weight_beyond(middle, counted, top, rate, listed, ID_BITS, BLOCK)
                # Between two keys the weight is the same.
                if weight < rest:
                    last = tl.maximum(under, below + 1)
                else:
                    below = over - 1
            below = last - 1
        for start in range(0, tl.where(count > LISTED, vocab, count), BLOCK):
            key = _candidates(listed, start + tl.arange(0, BLOCK), ID_BITS)
            x = score_of(key, ID_BITS)
            token = token_of(key, ID_BITS).to(tl.int32)
            kept = (key >= last) & _likely(x, top, rule)
            if tl.max(kept.to(tl.int32), 0) == 1:
                found = tl.maximum(
                    found, best_key(tl.where(kept, with_noise(x, token, rule), -float("inf")), token, ID_BITS)
                )
    chosen = tl.where(found == NONE, 0, token_of(found, ID_BITS))
    index = tl.load(rule + INDEX)
    healthy = tl.load(healthy_ptr + index) != FAILED
    tl.store(tokens_ptr + index, tl.where(healthy, chosen, FAILED))
    line = tl.load(rule + LINE).to(tl.int64)
    if line >= 0:
        counter = counts_ptr + line * vocab + tl.where(healthy, chosen, 0)
        tl.store(counter, tl.load(counter) + 2)
