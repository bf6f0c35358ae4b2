"""Attention within prompts and pictures on a CPU: in which numbers, and by a compiled kernel where it is the fastest.

Knows the processor's instructions, the compiled library and torch. Does not know layers.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvl.kernels.native import NativeUnavailable, load_native
from qvl.kernels.on_cpu.matrix_registers import has_matrix_registers

SOURCE = Path(__file__).with_name("dense_attention.c")
MAX_DIM = 256  # as in the C file
WRONG = 2e-2  # relative error; bf16 leaves a few thousandths
_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int

_log = logging.getLogger("qvl.kernels")


def attention_dtype(numbers: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """In what torch attends: the dtype of the weights or the cache, `numbers`, where it is faster than `compute`, in
    which activations come.

    With registers for matrices (AMX) torch takes 9 ms in bf16 for what takes it 25 in fp32: a layer of the tower at
    1,024 patches. Without them bf16 gains torch nothing.
    """
    narrow = numbers == torch.bfloat16 and compute == torch.float32
    return numbers if narrow and has_matrix_registers() else compute


@dataclass(frozen=True, slots=True)
class DenseKernel:
    """The compiled kernel: queries, keys, values and weights are rounded to bf16, sums are fp32."""

    library: Any

    def attend_segments(
        self, qkv: Tensor, angles: tuple[Tensor, Tensor], groups: Iterable[tuple[int, int, int]]
    ) -> Tensor:  # fp32 [n, 3, heads, head_dim], fp32 [n, 1, head_dim] twice -> fp32 [n, heads * head_dim]
        """Queries and keys turned by their angles, then attention inside each segment of `Segments.groups`."""
        _, _, heads, dim = qkv.shape
        qkv, cos, sin = qkv.contiguous(), angles[0].contiguous(), angles[1].contiguous()
        assert qkv.dtype == cos.dtype == sin.dtype == torch.float32
        out = torch.empty(len(qkv), heads * dim)
        for start, count, length in groups:
            q, k, v = qkv[start:].unbind(1)
            scratch = self.scratch(count, length, heads, dim)
            self.library.qvl_attend_dense(
                q.data_ptr(), k.data_ptr(), v.data_ptr(), cos[start:].data_ptr(), sin[start:].data_ptr(), None,
                out[start:].data_ptr(), scratch.data_ptr(), q.stride(0), k.stride(0), heads, heads, dim, count,
                length, length, 1, 0, torch.get_num_threads(),
            )  # fmt: skip
        return out

    def attend_prompt(self, q: Tensor, kv: tuple[Tensor, Tensor], blocks: Tensor, length: int, out: Tensor) -> None:
        """fp32 queries [m, heads, head_dim], the last of `length` tokens whose keys and values lie in `blocks`
        (int64) of a bf16 cache [.., block_size, kv_heads, head_dim]: into out, fp32 and contiguous like q.
        """
        keys, values = kv
        (count, heads, dim), (_, block_size, kv_heads, _) = q.shape, keys.shape
        blocks = blocks.contiguous()
        assert keys.dtype == torch.bfloat16
        assert q.is_contiguous() and out.is_contiguous() and keys.is_contiguous() and values.is_contiguous()
        scratch = self.scratch(1, length, kv_heads, dim)
        self.library.qvl_attend_dense(
            q.data_ptr(), keys.data_ptr(), values.data_ptr(), None, None, blocks.data_ptr(), out.data_ptr(),
            scratch.data_ptr(), heads * dim, kv_heads * dim, heads, kv_heads, dim, 1, length, count, block_size, 1,
            torch.get_num_threads(),
        )  # fmt: skip

    def scratch(self, segments: int, length: int, kv_heads: int, dim: int) -> Tensor:
        return torch.empty(self.library.qvl_dense_scratch(segments, length, kv_heads, dim), dtype=torch.uint8)


def dense_kernel(numbers: torch.dtype, compute: torch.dtype, head_dim: int) -> DenseKernel | None:
    """The compiled kernel where it is faster than torch and as exact as `numbers`; see `attention_dtype`."""
    narrow = numbers == torch.bfloat16 and compute == torch.float32
    fits = head_dim % 8 == 0 and head_dim <= MAX_DIM
    return chosen_kernel() if narrow and fits else None


@functools.cache
def chosen_kernel() -> DenseKernel | None:
    """The kernel on processors that multiply bf16 in vectors, fast, but have no registers for matrices; decided once
    per process, by trying. Elsewhere torch is as fast.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if supported is None or not supported() or has_matrix_registers():
        return None
    try:
        kernel = DenseKernel(open_library())
        if not kernel.library.qvl_dense_is_native():
            problem = "the compiler does not know the processor's products of bf16"
        elif not kernel.library.qvl_dense_is_fast():
            return None
        elif not computes_right(kernel):
            problem = "the compiled kernel computes wrong numbers"
        else:
            return kernel
    except NativeUnavailable as error:
        problem = str(error)
    _log.warning("attention in prompts and pictures is left to torch and takes about twice as long: %s", problem)
    return None


def open_library(flags: tuple[str, ...] = ()) -> Any:
    """The library with its signatures set. Raises NativeUnavailable."""
    library = load_native(SOURCE, flags)
    library.qvl_dense_scratch.argtypes = (_L,) * 4
    library.qvl_dense_scratch.restype = _L
    library.qvl_attend_dense.argtypes = (*(_P,) * 8, *(_L,) * 9, _I, _I)
    library.qvl_attend_dense.restype = None
    return library


def computes_right(kernel: DenseKernel) -> bool:
    """Two segments of more than a panel of keys, and a prompt behind cached tokens, against the same in fp64. They
    are small: where torch calls its threads, a busy machine takes its time.
    """
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(300, 3, 1, 24, generator=generator)
    angle = torch.zeros(300, 1, 24)
    out = kernel.attend_segments(qkv, (angle.cos(), angle.sin()), [(0, 2, 150)])
    for part, own in zip(qkv.double().split(150), out.split(150), strict=True):
        q, k, v = part.unbind(1)
        if not is_near(own, attended(q, k, v, len(k)).flatten(1)):
            return False
    q, cache = torch.randn(40, 4, 24, generator=generator), torch.randn(2, 13, 16, 2, 24, generator=generator)
    keys, values = cache.bfloat16()
    blocks, out = torch.arange(12, -1, -1), torch.empty_like(q)
    kernel.attend_prompt(q, (keys, values), blocks, 200, out)
    k, v = (x[blocks].flatten(0, 1)[:200].double().repeat_interleave(2, dim=1) for x in (keys, values))
    return is_near(out, attended(q.double(), k, v, 161))


def attended(q: Tensor, k: Tensor, v: Tensor, first_sees: int) -> Tensor:  # [m, heads, d], [n, heads, d] twice
    """Written out; the first query sees so many tokens, each one more than the one before it."""
    scores = torch.einsum("mhd,nhd->hmn", q, k) * q.shape[-1] ** -0.5
    seen = torch.arange(len(k)) < first_sees + torch.arange(len(q))[:, None]
    return torch.einsum("hmn,nhd->mhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def is_near(out: Tensor, exact: Tensor) -> bool:
    return bool((out - exact).norm() <= WRONG * exact.norm())
