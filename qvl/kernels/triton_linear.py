"""Matrices times a few rows on a GPU, in Triton: the weights are read once, at the speed of memory.

What stands around such a product is computed on the way: the norm of what goes in, scales of 8-bit weights, bias,
SiLU(gate) * up, and the sum with the residual. Knows tensors. Does not know layers. Importing this file imports Triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels.gpu import compiling_together, launch

WRONG = 2e-2
MOST_ROWS = 4  # above, tensor cores are worth their detour through shared memory


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of the weights that one program multiplies, and numbers of each that it reads at a time."""

    rows: int
    block: int

    @property
    def warps(self) -> int:
        return self.block // 256  # 16 bytes of 16-bit weights for each thread and row


@functools.cache
def shape_for(m: int, k: int) -> Shape:
    """Enough loads under way in each program, and registers for the sums of all m rows."""
    return Shape(4 if m == 1 else 2, 1024 if k % 1024 == 0 or k >= 8192 else 512)


def product(
    x: Tensor,  # [m, k] of 16 bits or fp32
    weight: Tensor,  # [n, k] of the same type, or fp8 with scales
    *,
    scales: Tensor | None = None,  # fp32 [n], what each row of `weight` is multiplied with
    norm: Tensor | None = None,  # [k]: RMSNorm(x) with this weight stands for x
    eps: float = 0.0,
    bias: Tensor | None = None,  # [n]
    gated: bool = False,  # SiLU of the first half of the rows times the second half
    residual: Tensor | None = None,  # [m, n], added
    early: bool = False,
    shape: Shape | None = None,
) -> Tensor:  # [m, n], or [m, n / 2] when gated
    """x times the transpose of `weight` and what belongs to it, summed in fp32 and rounded once; m <= MOST_ROWS."""
    (m, k), n = x.shape, weight.shape[0] // (2 if gated else 1)
    assert 1 <= m <= MOST_ROWS and weight.shape[1] == k, (x.shape, weight.shape)
    assert x.is_contiguous() and weight.is_contiguous()
    padded = 1 if m == 1 else MOST_ROWS  # two compilations, not one for every m
    shape = shape or shape_for(padded, k)
    out = x.new_empty(m, n)
    # What is not given is a pointer that is never followed.
    given = [x if tensor is None else tensor for tensor in (scales, norm, bias, residual)]
    launch(
        _product, (-(-weight.shape[0] // shape.rows),),
        x, weight, *given, out, m, n, k, eps,
        M=padded, ROWS=shape.rows, BLOCK=shape.block, SCALED=scales is not None, NORM=norm is not None,
        BIAS=bias is not None, GATED=gated, RESIDUAL=residual is not None, EARLY=early, num_warps=shape.warps,
    )  # fmt: skip
    return out


def problem_of(device: torch.device, dtype: torch.dtype, early: bool) -> str | None:
    """Small products of one and three rows against torch, compiled as a model's gate_up_proj is."""
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    weight, norm, most = numbers(128, 1040), numbers(1040), numbers(3, 1040)
    with compiling_together():
        for m in (1, 3):
            product(most[:m], weight, norm=norm, eps=1e-6, gated=True, early=early)
    for m in (1, 3):
        x = most[:m]
        gate, up = F.linear(F.rms_norm(x.float(), (1040,), norm.float(), 1e-6), weight.float()).chunk(2, dim=1)
        exact = F.silu(gate) * up
        out = product(x, weight, norm=norm, eps=1e-6, gated=True, early=early).float()
        error = float((out - exact).norm() / exact.norm())
        if not error < WRONG:
            return f"the kernel for products of few rows gave wrong numbers (relative error {error:.1e})"
    return None


@triton.jit(do_not_specialize=["m"])
def _product(
    x_ptr,
    w_ptr,
    scales_ptr,
    norm_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    m,
    n,
    k,
    eps,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: ROWS rows of the weights, read once, times up to four rows of x."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if GATED:
        rows = i // 2 + i % 2 * n  # a row of the gate and its row of up beside each other
        live = i < 2 * n
    else:
        rows = i
        live = i < n
    at = tl.arange(0, BLOCK)
    w_at = w_ptr + rows.to(tl.int64)[:, None] * k + at[None, :]
    # Weights are read one turn ahead; the first before the kernel in front has ended, which does not write them. The
    # kernel behind may begin so early too: no kernel ends before all in front of it have, so it waits for all of them.
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(w_at, mask=live[:, None] & (at < k)[None, :], other=0.0, eviction_policy="evict_first")
    if EARLY:
        tl.extra.cuda.gdc_wait()

    acc0 = tl.zeros([ROWS, BLOCK], tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    square0 = tl.zeros([BLOCK], tl.float32)
    square1, square2, square3 = square0, square0, square0
    for start in range(0, k, BLOCK):
        inside = start + at < k
        gain = tl.load(norm_ptr + start + at, mask=inside, other=0.0).to(tl.float32) if NORM else square0
        x_at = x_ptr + start + at
        ahead = live[:, None] & (start + BLOCK + at < k)[None, :]
        next_w = tl.load(w_at + start + BLOCK, mask=ahead, other=0.0, eviction_policy="evict_first")
        wide = w.to(tl.float32)
        acc0, square0 = _turn(acc0, square0, x_at, inside, gain, wide, NORM)
        if M > 1:
            acc1, square1 = _turn(acc1, square1, x_at + k, inside & (m > 1), gain, wide, NORM)
        if M > 2:
            acc2, square2 = _turn(acc2, square2, x_at + 2 * k, inside & (m > 2), gain, wide, NORM)
            acc3, square3 = _turn(acc3, square3, x_at + 3 * k, inside & (m > 3), gain, wide, NORM)
        w = next_w

    for token in tl.static_range(M):
        if token < m:
            acc = acc0 if token == 0 else acc1 if token == 1 else acc2 if token == 2 else acc3
            square = square0 if token == 0 else square1 if token == 1 else square2 if token == 2 else square3
            out = tl.sum(acc, 1)
            if NORM:
                out *= tl.rsqrt(tl.sum(square, 0) / k + eps)
            if SCALED:
                out *= tl.load(scales_ptr + rows, mask=live, other=0.0)
            if BIAS:
                out += tl.load(bias_ptr + rows, mask=live, other=0.0).to(tl.float32)
            if GATED:
                gate, up = tl.split(tl.reshape(out, [ROWS // 2, 2]))
                out = gate / (1.0 + tl.exp(-gate)) * up
                to = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
            else:
                to = rows
            if RESIDUAL:
                out += tl.load(residual_ptr + token * n + to, mask=to < n, other=0.0).to(tl.float32)
            tl.store(out_ptr + token * n + to, out.to(out_ptr.dtype.element_ty), mask=to < n)


@triton.jit
def _turn(acc, square, x_at, inside, gain, w, NORM: tl.constexpr):
    """One row of x against the weights at hand."""
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        square += x * x
        x *= gain
    return acc + x[None, :] * w, square
