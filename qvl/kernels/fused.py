"""What stands between the matrix products: one pass where there is a compiled kernel, torch's operations elsewhere.

Knows which tensors the compiled CPU kernels take (fp32, rows contiguous), and that a GPU has its own in Triton. Does
not know layers or names of weights.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels.fp8 import Rounded, round_rows
from qvl.kernels.gpu import gpu_kernels
from qvl.kernels.native import NativeUnavailable, load_native
from qvl.kernels.sums import Sums, finished, memory_of

SOURCE = Path(__file__).parent / "on_cpu" / "ops.c"
_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "qvl_add_rms_norm": (_P, _P, _P, _P, _L, _L, _F, _I),
    "qvl_add_layer_norm": (_P, _P, _P, _P, _P, _L, _L, _F, _I),
    "qvl_silu_and_mul": (_P, _P, _L, _L, _I),
    "qvl_quick_gelu": (_P, _P, _L, _I),
    "qvl_rotate": (_P, _L, _P, _P, _P, _L, _L, _L, _I),
    "qvl_store": (_P, _L, _P, _P, _L, _L, _I, _I),
    "qvl_decode_attention": (_P, _P, _P, _P, _L, _P, _P, _P, _L, _L, _L, _L, _L, _L, _F, _I, _I),
}


@functools.cache
def cpu_kernels() -> Any | None:
    """The compiled library with its signatures set, or None (the linear kernels tell the operator why)."""
    try:
        library = load_native(SOURCE, visible=True)  # all_layers.c calls it
    except NativeUnavailable:
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = None
    library.qvl_lanes.restype = _L
    return library


def kernels_for(x: Tensor) -> Any | None:
    """The compiled library when it can work on x."""
    return cpu_kernels() if x.device.type == "cpu" and x.dtype == torch.float32 else None


def add_rms_norm(
    x: Tensor | Sums, residual: Tensor | None, weight: Tensor, eps: float, eight_bits: bool = False
) -> tuple[Tensor | Rounded, Tensor]:
    """(norm(x + residual) * weight, x + residual), all [n, size]; the mean square is taken in fp32.

    `residual` may be overwritten with the sum. Without it: (norm(x) * weight, x). The norm comes in fp8 if asked for.
    """
    numbers = memory_of(x)
    contiguous = numbers.is_contiguous() and (residual is None or residual.is_contiguous())
    if numbers.is_cuda and contiguous and (gpu := gpu_kernels()) is not None:
        return gpu.add_rms_norm(x, residual, weight, eps, eight_bits)
    x = finished(x)
    library = kernels_for(x)
    if library is not None and contiguous:
        out = torch.empty_like(x)
        library.qvl_add_rms_norm(
            x.data_ptr(), None if residual is None else residual.data_ptr(), weight.data_ptr(), out.data_ptr(),
            x.shape[0], x.shape[1], eps, torch.get_num_threads(),
        )  # fmt: skip
        return out, x if residual is None else residual
    total = x if residual is None else x + residual
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    out = wide.to(x.dtype) * weight
    return round_rows(out) if eight_bits else out, total


def silu_and_mul(gate_up: Tensor, eight_bits: bool = False) -> Tensor | Rounded:  # [n, 2 * size] -> [n, size]
    """silu(first half) * second half, in fp8 if asked for."""
    if gate_up.is_cuda and gate_up.is_contiguous() and (gpu := gpu_kernels()) is not None:
        return gpu.silu_and_mul(gate_up, eight_bits)
    library = kernels_for(gate_up)
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    if library is not None and gate_up.is_contiguous():
        out = gate_up.new_empty(rows, size)
        library.qvl_silu_and_mul(gate_up.data_ptr(), out.data_ptr(), rows, size, torch.get_num_threads())
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    out = F.silu(gate) * up
    return round_rows(out) if eight_bits else out


def add_layer_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:  # all [n, size]
    """x += delta in place; the layer norm of the sum, into `out` if given. The variance is taken in fp32."""
    if x.is_cuda and x.is_contiguous() and (gpu := gpu_kernels()) is not None:
        return gpu.add_layer_norm(x, delta, weight, bias, eps, out)
    library = kernels_for(x)
    if library is not None and all(t is None or t.is_contiguous() for t in (x, delta, out)):
        normed = torch.empty_like(x) if out is None else out
        library.qvl_add_layer_norm(
            x.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), bias.data_ptr(),
            normed.data_ptr(), x.shape[0], x.shape[1], eps, torch.get_num_threads(),
        )  # fmt: skip
        return normed
    if delta is not None:
        x += delta
    normed = F.layer_norm(x, weight.shape, weight, bias, eps)
    return normed if out is None else out.copy_(normed)


def quick_gelu(x: Tensor) -> Tensor:  # any shape
    """x * sigmoid(1.702 x), the GELU approximation of CLIP and of this family's vision tower; may overwrite x."""
    if x.is_cuda and x.is_contiguous() and (gpu := gpu_kernels()) is not None:
        return gpu.quick_gelu(x)
    library = kernels_for(x)
    if library is not None and x.is_contiguous():
        library.qvl_quick_gelu(x.data_ptr(), x.data_ptr(), x.numel(), torch.get_num_threads())
        return x
    return x * torch.sigmoid(1.702 * x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [n, heads, head_dim], fp32 [n, 1, head_dim] twice
    """Turn each pair (i, i + head_dim / 2) by its angle; computed in fp32, returned in the dtype of x.

    x itself may be overwritten, and be what is returned.
    """
    rows, heads, dim = x.shape
    contiguous = x.stride(2) == 1 and x.stride(1) == dim and cos.is_contiguous() and sin.is_contiguous()
    if x.is_cuda and contiguous and (gpu := gpu_kernels()) is not None:
        return gpu.rotate(x, cos, sin)
    library = kernels_for(x)
    if library is not None and contiguous:
        out = x.new_empty(rows, heads, dim)
        library.qvl_rotate(
            x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), rows, heads, dim,
            torch.get_num_threads(),
        )  # fmt: skip
        return out
    half = dim // 2
    wide = x.float()
    turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    return torch.addcmul(wide * cos, turned, sin).to(x.dtype)


def split_and_rotate(
    qkv: Tensor, angles: tuple[Tensor, Tensor], cache: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:  # [n, (heads + 2 kv_heads) * head_dim] -> three of [n, (kv_)heads, head_dim]
    """Queries and keys turned by their angles, values as they are; `cache` ends in (kv_heads, head_dim)."""
    kv_heads, dim = cache
    x = qkv.unflatten(1, (-1, dim))
    q, k, v = x.split([x.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    return rotate(q, *angles), rotate(k, *angles), v
