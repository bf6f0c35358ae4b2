"""What kernels that choose tokens are made of: scores under the rules of a row, keys that order them, seeded noise. And
the simplest of them, the best token of every row.

Knows tensors and how rules are laid out (`qvl.kernels.rules`). Importing this file imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels import rules as layout
from qvl.kernels.gpu import cdiv, launch, next_power_of_2

INDEX, LINE, MASK, ITEMS, NUM_ITEMS, KEY = (
    tl.constexpr(field)
    for field in (layout.INDEX, layout.LINE, layout.MASK, layout.ITEMS, layout.NUM_ITEMS, layout.KEY)
)
SCALE, REPETITION, PRESENCE, FREQUENCY = (
    tl.constexpr(field) for field in (layout.SCALE, layout.REPETITION, layout.PRESENCE, layout.FREQUENCY)
)
BLOCK = 4096  # scores that one program holds
WARPS = 8
FAILED = tl.constexpr(-1)
NONE = tl.constexpr(-(1 << 62))  # below every key of a token, and BROKEN above
BROKEN = tl.constexpr(1 << 62)


def best(logits: Tensor, allowed: Tensor) -> Tensor:
    """The most likely token of every row, -1 where scores are not numbers. contiguous [m, vocab] -> int64 [m]

    `allowed` int32 [vocab / 32] has a bit per token that may be chosen.
    """
    rows, vocab = logits.shape
    parts = cdiv(vocab, BLOCK)
    keys = torch.empty((rows, parts), dtype=torch.int64, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    bits = id_bits(vocab)
    launch(_best, (rows, parts), logits, allowed, keys, vocab, ID_BITS=bits, BLOCK=BLOCK, num_warps=WARPS)
    launch(_merge, (rows,), keys, tokens, parts, ID_BITS=bits, PARTS=next_power_of_2(parts), num_warps=1)
    return tokens


def id_bits(vocab: int) -> int:
    return max(1, (vocab - 1).bit_length())


@triton.jit
def _best(logits_ptr, allowed_ptr, keys_ptr, vocab, ID_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the best key of one part of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < vocab
    x = tl.load(logits_ptr + row * vocab + at, mask=live, other=0.0).to(tl.float32)
    broken = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 0)
    word = tl.load(allowed_ptr + at // 32, mask=live, other=0)
    x = tl.where(((word >> (at % 32)) & 1) == 1, x, -float("inf"))
    key = tl.where(broken == 1, BROKEN, best_key(x, at, ID_BITS))
    tl.store(keys_ptr + row * tl.num_programs(1) + tl.program_id(1), key)


@triton.jit
def _merge(keys_ptr, tokens_ptr, parts, ID_BITS: tl.constexpr, PARTS: tl.constexpr):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    key = tl.max(tl.load(keys_ptr + row * parts + part, mask=part < parts, other=NONE), 0)
    tl.store(tokens_ptr + row, tl.where(key == BROKEN, FAILED, token_of(key, ID_BITS)))


@triton.jit
def scores_of(source, at, vocab):
    """Scores of the tokens `at` under the rules of a row, fp32; -inf for what may not be chosen."""
    logits_ptr, allowed_ptr, rules_ptr, rule, counts_ptr = source
    live = at < vocab
    index = tl.load(rule + INDEX).to(tl.int64)
    x = tl.load(logits_ptr + index * vocab + at, mask=live, other=-float("inf")).to(tl.float32)
    line = tl.load(rule + LINE).to(tl.int64)
    if line >= 0:
        count = tl.load(counts_ptr + line * vocab + at, mask=live, other=0).to(tl.int32)
        repetition = number_at(rule + REPETITION)
        x = tl.where(count > 0, tl.where(x > 0, x / repetition, x * repetition), x)
        times = count >> 1
        x = x - number_at(rule + FREQUENCY) * times.to(tl.float32)
        x = tl.where(times > 0, x - number_at(rule + PRESENCE), x)
    item = rules_ptr + tl.load(rule + ITEMS)
    for i in range(tl.load(rule + NUM_ITEMS)):
        x = tl.where(at == tl.load(item + 2 * i), x + number_at(item + 2 * i + 1), x)
    word = tl.load(allowed_ptr + at // 32, mask=live, other=0)
    mask = tl.load(rule + MASK)
    if mask >= 0:
        word = word & tl.load(rules_ptr + mask + at // 32, mask=live, other=0)
    return tl.where(((word >> (at % 32)) & 1) == 1, x, -float("inf"))


@triton.jit
def number_at(pointer):
    return tl.load(pointer).to(tl.float32, bitcast=True)


@triton.jit
def key_of(x, token, ID_BITS: tl.constexpr):
    """An int64 that is the larger the larger x, and among equals the smaller the token."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    ordered = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)
    return (ordered << ID_BITS) + ((1 << ID_BITS) - 1 - token.to(tl.int64))


@triton.jit
def token_of(key, ID_BITS: tl.constexpr):
    return ((1 << ID_BITS) - 1) - (key & ((1 << ID_BITS) - 1))


@triton.jit
def score_of(key, ID_BITS: tl.constexpr):
    ordered = (key >> ID_BITS).to(tl.int32)
    return tl.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def best_key(x, at, ID_BITS: tl.constexpr):
    """The key of the largest x; of the first of them."""
    top = tl.max(x, 0)
    return key_of(top, tl.min(tl.where(x == top, at, (1 << ID_BITS) - 1), 0), ID_BITS)


@triton.jit
def with_noise(x, token, rule):
    """Scaled x + Gumbel noise, which is a hash of the row's key and the token; qvl.engine.noise defines it."""
    first = tl.load(rule + KEY).to(tl.uint32, bitcast=True)
    second = tl.load(rule + KEY + 1).to(tl.uint32, bitcast=True)
    bits = _mix(_mix(token.to(tl.uint32) ^ first) ^ second)
    uniform = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / (1 << 31))
    uniform = tl.minimum(uniform, 1.0 - 1.0 / (1 << 24))
    # log1p(-u): the error of 1 - u is made good by the same error in the quotient.
    rest = 1.0 - uniform
    exponential = tl.where(rest == 1.0, uniform, -tl.log(rest) * (uniform / tl.where(rest == 1.0, 1.0, 1.0 - rest)))
    return x * number_at(rule + SCALE) - tl.log(exponential)


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)
