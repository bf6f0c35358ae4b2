"""What stands between the products of the vision tower on a GPU, one pass over memory each, in Triton.

Knows tensors. Does not know layers. Importing this file imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl.kernels.gpu import cdiv, launch, next_power_of_2

BLOCK = 1024


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor, scaled: int = 0, scale: float = 1.0) -> Tensor:
    """x [n, heads, head_dim], heads contiguous in a row: its pairs (i, i + dim / 2) turned by their angles in place.
    The first heads, `scaled` of them, are scaled as well.
    """
    rows, heads, dim = x.shape
    launch(
        _rotate, (rows,),
        x, cos, sin, x.stride(0), scale, SCALED=scaled, H=heads, D=dim, HEADS=next_power_of_2(heads),
        HALF=next_power_of_2(dim // 2), num_warps=4,
    )  # fmt: skip
    return x


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
    scale,
    SCALED: tl.constexpr,
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
    turned_low = a * cos - b * sin
    turned_high = b * cos + a * sin
    if SCALED > 0:
        factor = tl.where(head < SCALED, scale, 1.0)[:, None]
        turned_low *= factor
        turned_high *= factor
    tl.store(at, turned_low.to(low.dtype), mask=live)
    tl.store(at + D // 2, turned_high.to(low.dtype), mask=live)
