"""What stands between the matrix products on a GPU, one pass over memory each, in Triton.

Here those of the decoder; those of the tower come from `ops_tower`. Knows tensors, and products that are
finished here. Does not know layers. Importing this file imports Triton; `qvl.kernels.gpu` does so only where there is a
GPU.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels.fp8 import Rounded
from qvl.kernels.gpu import capability_of, cdiv, early_on, launch, next_power_of_2
from qvl.kernels.on_gpu.ops_tower import BLOCK, add_layer_norm, quick_gelu, rotate, warps_for
from qvl.kernels.sums import Sums

__all__ = ["add_layer_norm", "add_rms_norm", "quick_gelu", "rope_and_store", "rotate", "round_rows", "silu_and_mul"]

MANY = 128  # tokens from which on there are programs enough to make each larger
ROUND_BLOCK, ROUND_WARPS = 4096, 16  # numbers of a row at a time of `silu_and_mul` in fp8: 16 bytes of each thread
TURN_FEW, TURN_MANY = 4, 16  # heads that one program of `rope_and_store` turns


def add_rms_norm(
    x: Tensor | Sums, residual: Tensor | None, weight: Tensor, eps: float, eight_bits: bool = False
) -> tuple[Tensor | Rounded, Tensor]:
    """(norm(x + residual) * weight, x + residual) of contiguous [n, size]; `residual` is overwritten with the sum."""
    parts, numbers, constants = unfinished(x)
    total = parts if residual is None else residual
    rows, size = total.shape[-2:]
    out, codes, scales = outputs(total, (rows, size), eight_bits)
    block = next_power_of_2(size)
    launch(
        _add_rms_norm, (rows,),
        parts, *numbers, total, weight, codes, scales, size, eps, **constants, ADD=residual is not None,
        EIGHT_BITS=eight_bits, EARLY=early_on(capability_of(total.device)), BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return out, total


def silu_and_mul(gate_up: Tensor, eight_bits: bool = False) -> Tensor | Rounded:
    """silu(first half) * second half of contiguous [n, 2 * size]: [n, size]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out, codes, scales = outputs(gate_up, (rows, size), eight_bits)
    early = early_on(capability_of(gate_up.device))
    if not eight_bits:
        grid, warps = (rows, cdiv(size, BLOCK)), warps_for(BLOCK)
        launch(_silu_and_mul, grid, gate_up, codes, size, EARLY=early, BLOCK=BLOCK, num_warps=warps)
        return out
    # A row must be whole to know its largest number. Registers hold it in pieces: a power of two may be far more.
    launch(
        _silu_and_round, (rows,),
        gate_up, codes, scales, size, PIECES=cdiv(size, ROUND_BLOCK), EARLY=early, BLOCK=ROUND_BLOCK,
        num_warps=ROUND_WARPS,
    )  # fmt: skip
    return out


def unfinished(x: Tensor | Sums) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """What a kernel takes to read x: its parts, what is computed with them, and of these what there is.

    What is not given is a pointer that is never followed.
    """
    if isinstance(x, Tensor):
        return x, (x.numel(), 1.0, x, x), {"PARTS": 1, "SCALED": False}
    parts, scaled = x.parts, x.row_scales is not None
    assert parts.is_contiguous() and scaled == (x.column_scales is not None)
    scales = (x.row_scales, x.column_scales) if scaled else (parts, parts)
    return parts, (parts[0].numel(), x.factor, *scales), {"PARTS": len(parts), "SCALED": scaled}


def round_rows(x: Tensor) -> Rounded:
    """Contiguous x [n, size] in fp8."""
    out = Rounded.empty_like(x)
    block, early = next_power_of_2(x.shape[1]), early_on(capability_of(x.device))
    launch(
        _round_rows, (len(x),),
        x, out.codes, out.scales, x.shape[1], EARLY=early, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return out


def outputs(x: Tensor, shape: tuple[int, int], eight_bits: bool) -> tuple[Tensor | Rounded, Tensor, Tensor]:
    """Memory for a result in the dtype of x or in fp8, its numbers, its scales (when it has some)."""
    out = x.new_empty(shape)
    if not eight_bits:
        return out, out, out
    rounded = Rounded.empty_like(out)
    return rounded, rounded.codes, rounded.scales


def rope_and_store(
    qkv: Tensor | Sums, cos: Tensor, sin: Tensor, slots: Tensor, kv: tuple[Tensor, Tensor], early: bool
) -> Tensor:
    """Rotated queries [n, heads, head_dim]; rotated keys and the values go to their slots, those of -1 nowhere."""
    parts, numbers, constants = unfinished(qkv)
    bias = qkv.bias if isinstance(qkv, Sums) else None
    kv_heads, dim = kv[0].shape[2:]
    rows, heads = parts.shape[-2], parts.shape[-1] // dim - 2 * kv_heads
    q = kv[0].new_empty(rows, heads, dim)
    assert parts.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    each = TURN_FEW if rows < MANY else TURN_MANY
    launch(
        _rope_and_store, (rows, cdiv(heads + 2 * kv_heads, each)),
        parts, *numbers, q if bias is None else bias, cos, sin, slots, q, *kv, **constants, BIAS=bias is not None,
        H=heads, KH=kv_heads, D=dim, HEADS=each, EARLY=early, num_warps=1,
    )  # fmt: skip
    return q


@triton.jit
def _read(
    x_ptr, at, row, column, live, part_size, factor, rows_ptr, columns_ptr, PARTS: tl.constexpr, SCALED: tl.constexpr
):
    """In fp32: the sum of what lies there in each of PARTS parts, times its scales."""
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * part_size + at, mask=live, other=0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(rows_ptr + row) * factor * tl.load(columns_ptr + column, mask=live, other=0.0)
    return x


@triton.jit
def _rope_and_store(
    qkv_ptr,  # [PARTS, n, (H + 2 KH) * D]
    part_size,
    factor,
    rows_ptr,
    columns_ptr,
    bias_ptr,
    cos_ptr,  # fp32 [n, D], both halves alike
    sin_ptr,
    slots_ptr,  # int64 [n]
    q_ptr,  # [n, H, D]
    k_ptr,  # [slots, KH, D]
    v_ptr,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    H: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: HEADS heads of one token."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, D // 2)[None, :]
    column = head * D + half
    at = token * (H + 2 * KH) * D + column
    live = head < H + 2 * KH
    low = _read(qkv_ptr, at, token, column, live, part_size, factor, rows_ptr, columns_ptr, PARTS, SCALED)
    high = _read(
        qkv_ptr, at + D // 2, token, column + D // 2, live, part_size, factor, rows_ptr, columns_ptr, PARTS, SCALED
    )
    if BIAS:
        low += tl.load(bias_ptr + column, mask=live, other=0.0).to(tl.float32)
        high += tl.load(bias_ptr + column + D // 2, mask=live, other=0.0).to(tl.float32)
    low = low.to(q_ptr.dtype.element_ty)
    high = high.to(q_ptr.dtype.element_ty)
    cos = tl.load(cos_ptr + token * D + half)
    sin = tl.load(sin_ptr + token * D + half)
    a = low.to(tl.float32)
    b = high.to(tl.float32)
    turned_low = (a * cos - b * sin).to(low.dtype)
    turned_high = (b * cos + a * sin).to(low.dtype)
    q_at = q_ptr + (token * H + head) * D + half
    is_q = head < H
    tl.store(q_at, turned_low, mask=is_q)
    tl.store(q_at + D // 2, turned_high, mask=is_q)
    slot = tl.load(slots_ptr + token)
    k_at = k_ptr + (slot * KH + head - H) * D + half
    is_k = (head >= H) & (head < H + KH) & (slot >= 0)
    tl.store(k_at, turned_low, mask=is_k)
    tl.store(k_at + D // 2, turned_high, mask=is_k)
    v_at = v_ptr + (slot * KH + head - H - KH) * D + half
    is_v = (head >= H + KH) & live & (slot >= 0)
    tl.store(v_at, low, mask=is_v)
    tl.store(v_at + D // 2, high, mask=is_v)


@triton.jit
def _add_rms_norm(
    x_ptr,  # [PARTS, n, size]
    part_size,
    factor,
    rows_ptr,
    columns_ptr,
    total_ptr,
    weight_ptr,
    out_ptr,
    scales_ptr,
    size,
    eps,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
    ADD: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    row = token.to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    live = at < size
    total = tl.load(total_ptr + row + at, mask=live, other=0.0)
    if ADD:
        x = _read(x_ptr, row + at, token, at, live, part_size, factor, rows_ptr, columns_ptr, PARTS, SCALED)
        # Rounded to the activations' dtype before the norm, as two separate operations would.
        total = (total.to(tl.float32) + x).to(total.dtype)
        tl.store(total_ptr + row + at, total, mask=live)
    wide = total.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    weight = tl.load(weight_ptr + at, mask=live, other=0.0).to(tl.float32)
    _store(out_ptr + row + at, scales_ptr + token, wide.to(total.dtype).to(tl.float32) * weight, live, EIGHT_BITS)


@triton.jit
def _silu_and_mul(x_ptr, out_ptr, size, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK outputs of one row."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out = _gated(x_ptr + row * 2 * size, at, size)
    tl.store(out_ptr + row * size + at, out.to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _gated(row_ptr, at, size):
    """silu(gate) * up at the columns `at` of a row, rounded as two separate operations would."""
    live = at < size
    gate = tl.load(row_ptr + at, mask=live, other=0.0)
    up = tl.load(row_ptr + size + at, mask=live, other=0.0)
    wide = gate.to(tl.float32)
    return (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32) * up.to(tl.float32)


@triton.jit
def _silu_and_round(x_ptr, out_ptr, scales_ptr, size, PIECES: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row, PIECES times BLOCK numbers."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + token * 2 * size
    at = tl.arange(0, BLOCK)
    pieces = (_gated(row_ptr, at, size),)
    largest = tl.abs(pieces[0])
    for i in tl.static_range(1, PIECES):
        piece = _gated(row_ptr, i * BLOCK + at, size)
        pieces = pieces + (piece,)  # type: ignore[assignment]  # noqa: RUF005
        largest = tl.maximum(largest, tl.abs(piece))
    scale = tl.maximum(tl.max(largest, 0), 1e-12) / 448.0
    tl.store(scales_ptr + token, scale)
    for i in tl.static_range(PIECES):
        column = i * BLOCK + at
        out = (pieces[i] / scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token * size + column, out, mask=column < size)


@triton.jit
def _round_rows(x_ptr, out_ptr, scales_ptr, size, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    row = token.to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    live = at < size
    x = tl.load(x_ptr + row + at, mask=live, other=0.0).to(tl.float32)
    _store(out_ptr + row + at, scales_ptr + token, x, live, True)


@triton.jit
def _store(to, scale_to, wide, live, EIGHT_BITS: tl.constexpr):
    """A row of fp32, rounded, or in fp8 with the scale that makes its largest number the largest of fp8."""
    if EIGHT_BITS:
        scale = tl.maximum(tl.max(tl.abs(wide), 0), 1e-12) / 448.0
        tl.store(scale_to, scale)
        wide = wide / scale
    tl.store(to, wide.to(to.dtype.element_ty), mask=live)
