"""Matrices times one row on a GPU, in Triton: the weights are read once, at the speed of memory.

What stands around such a product is computed on the way: the norm of what goes in, scales of 8-bit weights, bias,
SiLU(gate) * up, and the sum with the residual. From two rows on the library is faster, whose tensor cores take them all
at once. Knows tensors. Does not know layers. Importing this file imports Triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels.gpu import compiling_together, launch, next_power_of_2

WRONG = 2e-2
WIDEST = 4096  # numbers of x that the threads of one program hold in registers
WARPS = 32  # of all programs that stand side by side on a multiprocessor
REGISTERS = 64  # of each thread, so that they do: 64 K are there


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of the weights that a program multiplies at a time, numbers of each that it reads at a time, its warps, and
    how many programs share the rows."""

    rows: int
    block: int
    warps: int
    programs: int


@functools.cache
def shape_for(rows: int, k: int, device: torch.device) -> Shape:
    """For weights [rows, k].

    A row of x that fits into registers stays there: as many programs as the device has room for go through the weights.
    A wider one is read again by every program, and each has two rows of the weights.
    """
    groups = -(-rows // 2)
    if k > WIDEST:
        return Shape(2, 2048, 8, groups)
    block = max(512, next_power_of_2(k))
    warps = block // 512
    return Shape(2, block, warps, min(groups, multiprocessors(device) * WARPS // warps))


def multiprocessors(device: torch.device) -> int:
    """One where there is no GPU, that is in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def product(
    x: Tensor,  # [1, k] of 16 bits or fp32
    weight: Tensor,  # [n, k] of the same type, or fp8 with scales
    *,
    scales: Tensor | None = None,  # fp32 [n], what each row of `weight` is multiplied with
    norm: Tensor | None = None,  # [k]: RMSNorm(x) with this weight stands for x
    eps: float = 0.0,
    bias: Tensor | None = None,  # [n]
    gated: bool = False,  # SiLU of the first half of the rows times the second half
    residual: Tensor | None = None,  # [1, n], added
    early: bool = False,
    shape: Shape | None = None,
) -> Tensor:  # [1, n], or [1, n / 2] when gated
    """x times the transpose of `weight` and what belongs to it, summed in fp32 and rounded once."""
    rows, k = weight.shape
    n = rows // (2 if gated else 1)
    assert x.shape == (1, k), (x.shape, weight.shape)
    assert x.is_contiguous() and weight.is_contiguous()
    shape = shape or shape_for(rows, k, x.device)
    out = x.new_empty(1, n)
    # What is not given is a pointer that is never followed.
    given = [x if tensor is None else tensor for tensor in (scales, norm, bias, residual)]
    launch(
        _product, (shape.programs,),
        x, weight, *given, out, n, k, eps,
        ROWS=shape.rows, BLOCK=shape.block, WHOLE=k <= shape.block, SCALED=scales is not None, NORM=norm is not None,
        BIAS=bias is not None, GATED=gated, RESIDUAL=residual is not None, EARLY=early,
        num_warps=shape.warps, maxnreg=REGISTERS,
    )  # fmt: skip
    return out


def problem_of(device: torch.device, dtype: torch.dtype, early: bool) -> str | None:
    """Small products of a row that fits into registers and of a wider one against torch, as in a model's MLP."""
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    cases = [(numbers(1, k), numbers(128, k), numbers(k)) for k in (1040, WIDEST + 16)]
    with compiling_together():
        for x, weight, norm in cases:
            product(x, weight, norm=norm, eps=1e-6, gated=True, early=early)
    for x, weight, norm in cases:
        gate, up = F.linear(F.rms_norm(x.float(), norm.shape, norm.float(), 1e-6), weight.float()).chunk(2, dim=1)
        exact = F.silu(gate) * up
        out = product(x, weight, norm=norm, eps=1e-6, gated=True, early=early).float()
        error = float((out - exact).norm() / exact.norm())
        if not error < WRONG:
            return f"the kernel for products of one row gave wrong numbers (relative error {error:.1e})"
    return None


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    scales_ptr,
    norm_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    n,
    k,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALED: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """ROWS rows of the weights, a group, at a time; they are read one turn ahead.

    WHOLE: a row fits into BLOCK, x is read once, and a program goes on to the group that lies as many groups behind as
    there are programs. Otherwise there is a program for each group.
    """
    at = tl.arange(0, BLOCK)
    first = tl.program_id(0)
    # The first weights are read before the kernel in front has ended, which does not write them. The kernel behind may
    # begin so early too: no kernel ends before all in front of it have, so it waits for all of them.
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    w = _weights(w_ptr, first, at, n, k, ROWS, GATED)
    if EARLY:
        tl.extra.cuda.gdc_wait()

    if WHOLE:
        x = tl.load(x_ptr + at, mask=at < k, other=0.0).to(tl.float32)
        if NORM:
            factor = tl.rsqrt(tl.sum(x * x, 0) / k + eps)
            x *= factor * tl.load(norm_ptr + at, mask=at < k, other=0.0).to(tl.float32)
        for group in range(first, tl.cdiv(2 * n if GATED else n, ROWS), tl.num_programs(0)):
            next_w = _weights(w_ptr, group + tl.num_programs(0), at, n, k, ROWS, GATED)
            out = tl.sum(w.to(tl.float32) * x[None, :], 1)
            _store(out, group, scales_ptr, bias_ptr, residual_ptr, out_ptr, n, ROWS, SCALED, BIAS, GATED, RESIDUAL)
            w = next_w
    else:
        acc = tl.zeros([ROWS, BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        for start in range(0, k, BLOCK):
            next_w = _weights(w_ptr, first, start + BLOCK + at, n, k, ROWS, GATED)
            inside = start + at < k
            x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                square += x * x
                x *= tl.load(norm_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
            acc += w.to(tl.float32) * x[None, :]
            w = next_w
        out = tl.sum(acc, 1)
        if NORM:
            out *= tl.rsqrt(tl.sum(square, 0) / k + eps)
        _store(out, first, scales_ptr, bias_ptr, residual_ptr, out_ptr, n, ROWS, SCALED, BIAS, GATED, RESIDUAL)


@triton.jit
def _rows_of(group, n, ROWS: tl.constexpr, GATED: tl.constexpr):
    """Which rows of the weights a group has, and which of them there are."""
    i = group * ROWS + tl.arange(0, ROWS)
    if GATED:
        return i // 2 + i % 2 * n, i < 2 * n  # a row of the gate and its row of up beside each other
    return i, i < n


@triton.jit
def _weights(w_ptr, group, at, n, k, ROWS: tl.constexpr, GATED: tl.constexpr):
    rows, live = _rows_of(group, n, ROWS, GATED)
    here = live[:, None] & (at < k)[None, :]
    return tl.load(w_ptr + rows.to(tl.int64)[:, None] * k + at[None, :], here, 0.0, eviction_policy="evict_first")


@triton.jit
def _store(
    out,
    group,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    n,
    ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """The products of a group, and what is computed behind them."""
    rows, live = _rows_of(group, n, ROWS, GATED)
    if SCALED:
        out *= tl.load(scales_ptr + rows, mask=live, other=0.0)
    if BIAS:
        out += tl.load(bias_ptr + rows, mask=live, other=0.0).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.reshape(out, [ROWS // 2, 2]))
        out = gate / (1.0 + tl.exp(-gate)) * up
        to = group * (ROWS // 2) + tl.arange(0, ROWS // 2)
    else:
        to = rows
    if RESIDUAL:
        out += tl.load(residual_ptr + to, mask=to < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=to < n)
