"""Products of fp32 activations with 16- or 32-bit weights on a CPU.

Knows three ways: the compiled kernel (reads the weights as they are, at the speed of memory), torch's own product where
the processor has 16-bit instructions, and widening panels of the weights for torch's fp32 product. Where bf16 is
multiplied in pairs, `linear_pairs` holds it instead. Does not know layers.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels.native import NativeUnavailable, load_native, threads_for

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

SOURCE = Path(__file__).with_name("linear_floats.c")
TURNS = 3  # of measuring both: what else runs disturbs one more than the other
GROUP = 64  # the kernel pads rows of x to a multiple of at most this many numbers
FEW = 8  # up to so many rows a product is bound by memory, above by arithmetic
SEVERAL = 128  # up to so many what torch does first, turning all of the weights, is much of its time
SLICE = 512  # rows of x at most that are rearranged and multiplied at a time: they meet every panel of the weights
PANEL_BYTES = 8 * 1024 * 1024
CLEARLY = 0.8  # of the compiled kernel's time
PERHAPS = 0.9  # of it: within what a measurement may be wrong, and a row's answer is the same alone and among many
NAMES = {torch.bfloat16: "qvl_linear_bf16", torch.float16: "qvl_linear_f16", torch.float32: "qvl_linear_f32"}

_log = logging.getLogger("qvl.kernels")


@dataclass(frozen=True, slots=True)
class CpuLinear:
    """The chosen product for `FEW` rows or less, the one for `SEVERAL` or less and the one for more, and why."""

    few: Product
    several: Product
    many: Product
    reason: str

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.shape[0]
        return (self.few if rows <= FEW else self.several if rows <= SEVERAL else self.many)(x, weight, bias)


@functools.cache
def choose_cpu_linear(dtype: torch.dtype) -> CpuLinear:
    """What is fastest here for weights of `dtype`; decided once per process, in well under a second after the first
    build.
    """
    torch_reason = "torch has 16-bit matrix instructions here" if has_16_bit_matmul(dtype) else ""
    try:
        native = native_product(dtype)
    except NativeUnavailable as error:
        warn_once(str(error))
        if dtype == torch.float32:
            return CpuLinear(whole, whole, whole, f"torch fp32 ({error})")
        if torch_reason:
            return CpuLinear(whole, whole, whole, f"torch {dtype} ({torch_reason}; {error})")
        return CpuLinear(rounded_or_panels, panels, panels, f"torch, weights widened by panels ({error})")
    if dtype == torch.float32:
        return CpuLinear(native, whole, whole, "compiled kernel for few rows, torch fp32 for many")
    if torch_reason:
        return measured(native, dtype)
    return CpuLinear(native, native, native, f"compiled kernel ({dtype} weights, fp32 sums)")


def preferred_cpu_dtype() -> tuple[torch.dtype, str]:
    """The faster weight dtype on this CPU, and why."""
    try:
        native_product(torch.bfloat16)
    except NativeUnavailable as error:
        if has_16_bit_matmul(torch.bfloat16):
            return torch.bfloat16, "the processor has bf16 matrix instructions"
        return torch.float32, f"no bf16 instructions and no compiled kernel ({error})"
    return torch.bfloat16, "the compiled kernel reads bf16 weights at the speed of memory: half the bytes of fp32"


def has_16_bit_matmul(dtype: torch.dtype) -> bool:
    """Whether torch computes products of this dtype with 16-bit instructions rather than a plain loop."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


@functools.cache
def native_product(dtype: torch.dtype) -> Product:
    """The compiled kernel for weights of `dtype`; NativeUnavailable says why there is none."""
    function = getattr(load_native(SOURCE), NAMES[dtype])
    pointer, long = ctypes.c_void_p, ctypes.c_long
    pointers, longs = [pointer] * 4, [long] * 3
    function.argtypes = [pointer, long, *pointers, *longs, ctypes.c_int, ctypes.c_int]
    function.restype = None
    split = int(dtype == torch.bfloat16)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.stride(-1) != 1:
            x = x.contiguous()
        (m, k), n = x.shape, weight.shape[0]
        assert x.dtype == torch.float32, x.dtype
        assert weight.is_contiguous(), weight.stride()
        out = torch.empty(m, n)
        threads = threads_for(m, n, k, torch.get_num_threads())
        scratch = torch.empty(min(m, SLICE) * (k + GROUP))
        slices = max(1, -(-m // SLICE))
        for start, stop in pairwise(m * i // slices for i in range(slices + 1)):
            function(
                x.data_ptr() + 4 * start * x.stride(0), x.stride(0), weight.data_ptr(),
                None if bias is None else bias.data_ptr(), out.data_ptr() + 4 * start * n, scratch.data_ptr(),
                stop - start, n, k, split, threads,
            )  # fmt: skip
        return out

    return product


def whole(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own product in the dtype of the weights."""
    out = F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return out if bias is None else out.add_(bias)


def panels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Some rows of the weights at a time in fp32, so that the process holds little more than the 16-bit weights."""
    rows = max(1, PANEL_BYTES // (4 * weight.shape[1]))
    out = torch.empty(x.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], rows):
        panel = weight[start : start + rows].float()
        out[:, start : start + rows] = x @ panel.T
    return out if bias is None else out.add_(bias)


def rounded_or_panels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch multiplies one 16-bit row faster than it widens the weights."""
    return (whole if x.shape[0] == 1 else panels)(x, weight, bias)


def measured(native: Product, dtype: torch.dtype) -> CpuLinear:
    """Compiled kernel or torch, by a measurement of both on matrices that no cache holds.

    Rows are torch's only if it is faster beyond doubt, few of them only if clearly so: with the compiled kernel all
    layers of a token are one call. The matrix is ones, as all pages of zeros are the same one, and as wide as those of
    the 7B: rows that lie a power of two apart share few lines of a cache, which would be to torch's disadvantage.
    """
    weight = torch.ones(6144, 3584, dtype=dtype)
    chosen: list[Product] = []
    words = []
    for rows, part, height in ((1, CLEARLY, 6144), (64, PERHAPS, 6144), (256, PERHAPS, 1536)):
        turns = [(seconds(native, weight[:height], rows), seconds(whole, weight[:height], rows)) for _ in range(TURNS)]
        ours, theirs = (min(times) for times in zip(*turns, strict=True))
        is_ours = ours * part <= theirs
        chosen.append(native if is_ours else whole)
        name = "compiled kernel" if is_ours else "torch"
        words.append(f"{rows} rows: {name} ({ours * 1e3:.1f} ms compiled, {theirs * 1e3:.1f} ms torch)")
    few, several, many = chosen
    return CpuLinear(few, several, many, "; ".join(words))


def seconds(product: Product, weight: Tensor, rows: int) -> float:
    """The best of three, after one to warm up."""
    x = torch.ones(rows, weight.shape[1])
    product(x, weight, None)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        product(x, weight, None)
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def warn_once(reason: str) -> None:
    """Tell the operator what is lost and why."""
    _log.warning(
        "compiled CPU kernels are off: %s. Answers stay the same, but a token of 16-bit weights takes twice as long",
        reason,
    )
