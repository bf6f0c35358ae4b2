"""Matrices times 2 to 64 rows on compute capability 9.0, in Gluon: the weights are read once, at the speed of memory.

The weights are the long side of the tensor cores' product: a program takes 64 or 128 of their rows and a part of their
width, fetched by TMA. The first of them are under way before the kernel in front has ended, which does not write them,
so that memory is never idle between two products. Knows tensors. Does not know layers. Importing this file imports
Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qvl.kernels.gpu import compiling_together, launch, next_power_of_2
from qvl.kernels.on_gpu.boxes import described, meet
from qvl.kernels.sums import Sums, finished

BOX = 64  # rows of the weights that four warps multiply at a time
PROGRAMS = 132  # at most, where one matrix does not make more: they all run at a time
MANY = 4 * PROGRAMS  # from which on they take turns anyway
FEW_TOKENS = 16  # that leave room for more of the weights
MOST_SPLITS = 8
WRONG = 2e-2


@dataclass(frozen=True, slots=True)
class Cut:
    """What a program takes: `boxes` times 64 rows of the weights, one of `splits` parts of their width, `depth` numbers
    of each at a time, of which `stages` are under way."""

    boxes: int
    splits: int
    depth: int
    stages: int


def cut_for(n: int, k: int, tokens: int, gated: bool) -> Cut:
    """For weights [n, k] (n of gate and n of up when gated). Measured: 256 numbers of a row at a time come faster than
    128, but what is not under way does not come at all."""
    deep = k % 256 == 0
    if gated:
        return Cut(2, 1, 256, 2) if deep and tokens > FEW_TOKENS else Cut(2, 1, 128, 3)
    if n // BOX > MANY and n % (2 * BOX) == 0:
        return Cut(2, 1, 128, 3)
    splits = max(1, min(PROGRAMS // (n // BOX), k // 256, MOST_SPLITS))
    return Cut(1, splits, 256, 5) if deep and tokens <= FEW_TOKENS else Cut(1, splits, 128, 6)


def takes(weight: Tensor, gated: bool) -> bool:
    """Whether boxes cover it."""
    n, k = weight.shape
    return n % (2 * BOX if gated else BOX) == 0 and k % 128 == 0 and weight.is_contiguous()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, cut: Cut | None = None) -> Sums:
    """x [m, k] times the transpose of `weight` [n, k], plus bias [n], in fp32: [splits, m, n]."""
    (m, k), n = x.shape, len(weight)
    cut = cut or cut_for(n, k, tokens_for(m), False)
    out = torch.empty((cut.splits, m, n), dtype=x.dtype if cut.splits == 1 else torch.float32, device=x.device)
    _launch(x, weight, bias, out, cut, n, False)
    return Sums(out, x.dtype)


def gated_product(x: Tensor, weight: Tensor, cut: Cut | None = None) -> Tensor:
    """SiLU of x [m, k] times the first half of the rows of `weight` [2 n, k], times x times the others: [m, n]."""
    (m, k), n = x.shape, len(weight) // 2
    out = x.new_empty(m, n)
    _launch(x, weight, None, out, cut or cut_for(n, k, tokens_for(m), True), n, True)
    return out


def tokens_for(rows: int) -> int:
    """Rows of x in a box."""
    return max(8, next_power_of_2(rows))


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, cut: Cut, n: int, gated: bool) -> None:
    m, k = x.shape
    tiles = n // (BOX if gated else BOX * cut.boxes)
    launch(
        _product, (tiles * cut.splits,),
        *described(weight, (BOX, cut.depth)), *described(x, (tokens_for(m), cut.depth)), x if bias is None else bias,
        out, m, n, tiles, k // cut.depth, BOXES=cut.boxes, SPLITS=cut.splits, STAGES=cut.stages, BIAS=bias is not None,
        GATED=gated, EARLY=True, num_warps=4,
    )  # fmt: skip


def problem_of(device: torch.device, dtype: torch.dtype) -> str | None:
    """Small products of 5 and 40 rows against torch: in parts with a bias, and gated."""
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    cases = [(numbers(rows, 1280), numbers(256, 1280), numbers(256)) for rows in (5, 40)]
    with compiling_together():
        for x, weight, bias in cases:
            product(x, weight, bias)
            gated_product(x, weight)
    for x, weight, bias in cases:
        exact = F.linear(x.float(), weight.float())
        gate, up = exact.chunk(2, dim=1)
        pairs = (
            (finished(product(x, weight, bias)), exact + bias.float()),
            (gated_product(x, weight), F.silu(gate) * up),
        )
        for out, right in pairs:
            error = float((out.float() - right).norm() / right.norm())
            if not error < WRONG:
                return f"the kernel for products of a few rows gave wrong numbers (relative error {error:.1e})"
    return None


@gluon.jit
def _store(out_ptr, acc, bias_ptr, first, m, n, with_bias, BIAS: gl.constexpr):
    """Rows [first, first + 64) of the weights for all rows of x."""
    TOKENS: gl.constexpr = acc.shape[1]
    L: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, 4], [0, 1])
    acc = gl.convert_layout(acc, L)
    row = first + gl.arange(0, acc.shape[0], gl.SliceLayout(1, L))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, L))
    if BIAS:
        live = (row < n) & with_bias
        acc += gl.load(bias_ptr + row, mask=live, other=0.0).to(gl.float32)[:, None]
    to = out_ptr + token.to(gl.int64)[None, :] * n + row[:, None]
    gl.store(to, acc.to(out_ptr.dtype.element_ty), mask=(token < m)[None, :] & (row < n)[:, None])


@gluon.jit(do_not_specialize=["m", "tiles", "chunks"])
def _product(
    w,  # [n or 2 n, k] in boxes of 64 rows
    x,  # [m, k] in boxes of all rows
    bias_ptr,  # [n]
    out_ptr,  # [m, n], or fp32 [SPLITS, m, n]
    m,
    n,
    tiles,
    chunks,
    BOXES: gl.constexpr,
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,
    BIAS: gl.constexpr,
    GATED: gl.constexpr,
    EARLY: gl.constexpr,
):
    """One program: BOXES times 64 rows of the weights, and one of SPLITS parts of their width."""
    BOX: gl.constexpr = w.block_shape[0]
    DEPTH: gl.constexpr = w.block_shape[1]
    TOKENS: gl.constexpr = x.block_shape[0]
    BYTES: gl.constexpr = (BOXES * BOX + TOKENS) * DEPTH * 2
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    tile = gl.program_id(0) % tiles
    split = gl.program_id(0) // tiles
    row = tile * (BOX if GATED else BOXES * BOX)
    second = row + (n if GATED else BOX)
    start = split * chunks // SPLITS
    count = (split + 1) * chunks // SPLITS - start

    w0 = gl.allocate_shared_memory(w.dtype, [STAGES, BOX, DEPTH], w.layout)
    w1 = gl.allocate_shared_memory(w.dtype, [STAGES if BOXES == 2 else 1, BOX, DEPTH], w.layout)
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, DEPTH], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    if EARLY:
        gdc_launch_dependents()
    for i in gl.static_range(STAGES):
        live = i < count
        mbarrier.expect(full.index(i), BYTES, pred=live)
        tma.async_copy_global_to_shared(w, [row, (start + i) * DEPTH], full.index(i), w0.index(i), pred=live)
        if BOXES == 2:
            tma.async_copy_global_to_shared(w, [second, (start + i) * DEPTH], full.index(i), w1.index(i), pred=live)
    if EARLY:
        gdc_wait()
    for i in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(x, [0, (start + i) * DEPTH], full.index(i), xs.index(i), pred=i < count)

    acc0 = gl.zeros((BOX, TOKENS), gl.float32, S)
    acc1 = gl.zeros((BOX, TOKENS), gl.float32, S)
    for i in range(count):
        at = i % STAGES
        mbarrier.wait(full.index(at), (i // STAGES) & 1)
        next0 = warpgroup_mma(w0.index(at), xs.index(at).permute((1, 0)), acc0, is_async=True)
        if BOXES == 2:
            next1 = warpgroup_mma(w1.index(at), xs.index(at).permute((1, 0)), acc1, is_async=True)
            acc0, acc1 = warpgroup_mma_wait(0, deps=(next0, next1))
        else:
            acc0 = warpgroup_mma_wait(0, deps=(next0,))
        meet()  # all four warps have read what is overwritten now
        ahead = i + STAGES
        live = ahead < count
        column = (start + ahead) * DEPTH
        mbarrier.expect(full.index(at), BYTES, pred=live)
        tma.async_copy_global_to_shared(w, [row, column], full.index(at), w0.index(at), pred=live)
        if BOXES == 2:
            tma.async_copy_global_to_shared(w, [second, column], full.index(at), w1.index(at), pred=live)
        tma.async_copy_global_to_shared(x, [0, column], full.index(at), xs.index(at), pred=live)

    if GATED:
        acc0 = acc0 / (1.0 + gl.exp(-acc0)) * acc1
    to_ptr = out_ptr + split.to(gl.int64) * m * n
    _store(to_ptr, acc0, bias_ptr, row, m, n, split == 0, BIAS)
    if BOXES == 2 and not GATED:
        _store(to_ptr, acc1, bias_ptr, second, m, n, split == 0, BIAS)
