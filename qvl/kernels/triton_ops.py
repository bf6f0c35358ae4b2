"""What stands between the matrix products on a GPU, one pass over memory each, in Triton.

Knows tensors. Does not know layers. Importing this file imports Triton; `qvl.kernels.gpu` does so only where there is
a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels.fp8 import Rounded
from qvl.kernels.gpu import capability_of, cdiv, early_on, launch, next_power_of_2

BLOCK = 1024
MANY = 128  # tokens from which on there are programs enough to make each larger
TURN_FEW, TURN_MANY = 4, 16  # heads that one program of `rope_and_store` turns


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, eight_bits: bool = False
) -> tuple[Tensor | Rounded, Tensor]:
    """(norm(x + residual) * weight, x + residual) of contiguous [n, size]; `residual` is overwritten with the sum.

    With a residual, x may come as several parts, fp32 [parts, n, size], whose sum it is.
    """
    assert x.dim() == 2 or residual is not None
    total = x if residual is None else residual
    rows, size = total.shape
    out, codes, scales = outputs(total, size, eight_bits)
    block = next_power_of_2(size)
    launch(
        _add_rms_norm, (rows,),
        x, total, weight, codes, scales, size, eps, rows * size, PARTS=parts_of(x), ADD=residual is not None,
        EIGHT_BITS=eight_bits, EARLY=early_on(capability_of(x.device)), BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return out, total


def parts_of(x: Tensor) -> int:
    """How many parts [parts, n, size] its numbers come in; 0: none, it is [n, size]."""
    return 0 if x.dim() == 2 else len(x)


def silu_and_mul(gate_up: Tensor, eight_bits: bool = False) -> Tensor | Rounded:
    """silu(first half) * second half of contiguous [n, 2 * size]: [n, size]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out, codes, scales = outputs(gate_up, size, eight_bits)
    # A row must be whole to know its largest number; without that, more programs are better.
    block = next_power_of_2(size) if eight_bits else BLOCK
    launch(
        _silu_and_mul,
        (rows, cdiv(size, block)),
        gate_up,
        codes,
        scales,
        size,
        EIGHT_BITS=eight_bits,
        EARLY=early_on(capability_of(gate_up.device)),
        BLOCK=block,
        num_warps=warps_for(block),
    )
    return out


def round_rows(x: Tensor) -> Rounded:
    """Contiguous x [n, size] in fp8."""
    out = Rounded.empty_like(x)
    block = next_power_of_2(x.shape[1])
    launch(_round_rows, (len(x),), x, out.codes, out.scales, x.shape[1], BLOCK=block, num_warps=warps_for(block))
    return out


def outputs(x: Tensor, size: int, eight_bits: bool) -> tuple[Tensor | Rounded, Tensor, Tensor]:
    """Memory for a result [n, size] in the dtype of x or in fp8, its numbers, its scales (when it has some)."""
    out = x.new_empty(len(x), size)
    if not eight_bits:
        return out, out, out
    rounded = Rounded.empty_like(out)
    return rounded, rounded.codes, rounded.scales


def warps_for(block: int) -> int:
    """8 to 64 numbers for each thread."""
    return min(16, max(1, block // 512))


def add_layer_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """x += delta of contiguous [n, size] in place; the layer norm of the sum, in `out` if given."""
    size = x.shape[1]
    out = torch.empty_like(x) if out is None else out
    assert x.is_contiguous() and out.is_contiguous() and (delta is None or delta.is_contiguous())
    block = next_power_of_2(size)
    launch(
        _add_layer_norm, (len(x),),
        x, x if delta is None else delta, weight, bias, out, size, eps, ADD=delta is not None, BLOCK=block,
        num_warps=warps_for(block),
    )  # fmt: skip
    return out


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x) of a contiguous tensor, in place."""
    launch(_quick_gelu, (cdiv(x.numel(), BLOCK),), x, x.numel(), BLOCK=BLOCK, num_warps=4)
    return x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, heads, head_dim], heads contiguous in a row: its pairs (i, i + dim / 2) turned by their angles in place."""
    rows, heads, dim = x.shape
    launch(
        _rotate, (rows,),
        x, cos, sin, x.stride(0), H=heads, D=dim, HEADS=next_power_of_2(heads),
        HALF=next_power_of_2(dim // 2), num_warps=4,
    )  # fmt: skip
    return x


def rope_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, kv: tuple[Tensor, Tensor], early: bool
) -> Tensor:
    """Rotated queries [n, heads, head_dim]; rotated keys and the values go to their slots, those of -1 nowhere.

    qkv is [n, width], or comes as several parts, fp32 [parts, n, width], whose sum it is.
    """
    kv_heads, dim = kv[0].shape[2:]
    rows, heads = qkv.shape[-2], qkv.shape[-1] // dim - 2 * kv_heads
    q = kv[0].new_empty(rows, heads, dim)
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    each = TURN_FEW if rows < MANY else TURN_MANY
    launch(
        _rope_and_store, (rows, cdiv(heads + 2 * kv_heads, each)),
        qkv, cos, sin, slots, q, *kv, rows * qkv.shape[-1], PARTS=parts_of(qkv), H=heads, KH=kv_heads, D=dim,
        HEADS=each, EARLY=early, num_warps=1,
    )  # fmt: skip
    return q


@triton.jit
def _rope_and_store(
    qkv_ptr,  # [n, (H + 2 KH) * D], or fp32 [PARTS, n, (H + 2 KH) * D]
    cos_ptr,  # fp32 [n, D], both halves alike
    sin_ptr,
    slots_ptr,  # int64 [n]
    q_ptr,  # [n, H, D]
    k_ptr,  # [slots, KH, D]
    v_ptr,
    part_size,
    PARTS: tl.constexpr,
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
    at = qkv_ptr + (token * (H + 2 * KH) + head) * D + half
    live = head < H + 2 * KH
    low = _sum_of(at, live, part_size, PARTS).to(q_ptr.dtype.element_ty)
    high = _sum_of(at + D // 2, live, part_size, PARTS).to(q_ptr.dtype.element_ty)
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
def _sum_of(at, live, part_size, PARTS: tl.constexpr):
    """What lies there, or the sum of what lies there in each of PARTS parts."""
    x = tl.load(at, mask=live, other=0.0)
    for part in tl.static_range(1, PARTS):
        x += tl.load(at + part * part_size, mask=live, other=0.0)
    return x


@triton.jit
def _add_rms_norm(
    x_ptr,  # [n, size], or fp32 [PARTS, n, size]
    total_ptr,
    weight_ptr,
    out_ptr,
    scales_ptr,
    size,
    eps,
    part_size,
    PARTS: tl.constexpr,
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
        x = _sum_of(x_ptr + row + at, live, part_size, PARTS)
        # Rounded to the activations' dtype before the norm, as two separate operations would.
        total = (total.to(tl.float32) + x.to(tl.float32)).to(total.dtype)
        tl.store(total_ptr + row + at, total, mask=live)
    wide = total.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    weight = tl.load(weight_ptr + at, mask=live, other=0.0).to(tl.float32)
    _store(out_ptr + row + at, scales_ptr + token, wide.to(total.dtype).to(tl.float32) * weight, live, EIGHT_BITS)


@triton.jit
def _silu_and_mul(x_ptr, out_ptr, scales_ptr, size, EIGHT_BITS: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK outputs of one row."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    row = token.to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    gate = tl.load(x_ptr + row * 2 * size + at, mask=live, other=0.0)
    up = tl.load(x_ptr + row * 2 * size + size + at, mask=live, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    _store(out_ptr + row * size + at, scales_ptr + token, silu * up.to(tl.float32), live, EIGHT_BITS)


@triton.jit
def _round_rows(x_ptr, out_ptr, scales_ptr, size, BLOCK: tl.constexpr):
    """One program: one row."""
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


@triton.jit
def _add_layer_norm(x_ptr, delta_ptr, weight_ptr, bias_ptr, out_ptr, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    live = at < size
    x = tl.load(x_ptr + row + at, mask=live, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + row + at, mask=live, other=0.0)
        # Rounded before the norm, as two separate operations would.
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(x_ptr + row + at, x, mask=live)
    wide = x.to(tl.float32)
    wide = tl.where(live, wide - tl.sum(wide, 0) / size, 0.0)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    weight = tl.load(weight_ptr + at, mask=live, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + at, (wide * weight + bias).to(x.dtype), mask=live)


@triton.jit
def _quick_gelu(x_ptr, count, BLOCK: tl.constexpr):
    """One program: BLOCK values."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    x = tl.load(x_ptr + at, mask=live, other=0.0)
    wide = x.to(tl.float32)
    tl.store(x_ptr + at, (wide / (1.0 + tl.exp(-1.702 * wide))).to(x.dtype), mask=live)


@triton.jit
def _rotate(
    x_ptr,
    cos_ptr,
    sin_ptr,
    x_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One program: all heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    dims = tl.arange(0, HALF)
    live = (head < H)[:, None] & (dims < D // 2)[None, :]
    at = x_ptr + token * x_stride + head[:, None] * D + dims[None, :]
    low = tl.load(at, mask=live, other=0.0)
    high = tl.load(at + D // 2, mask=live, other=0.0)
    cos = tl.load(cos_ptr + token * D + dims, mask=dims < D // 2, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * D + dims, mask=dims < D // 2, other=0.0)[None, :]
    a = low.to(tl.float32)
    b = high.to(tl.float32)
    tl.store(at, (a * cos - b * sin).to(low.dtype), mask=live)
    tl.store(at + D // 2, (b * cos + a * sin).to(low.dtype), mask=live)
