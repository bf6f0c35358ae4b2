"""All layers of a decoder for a step of decodes on a CPU, in one call of compiled code.

Knows the call, its memory, and which functions multiply in it. Does not know layers or names of weights: they come in
the order of all_layers.c.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from qvl.kernels.fused import cpu_kernels
from qvl.kernels.native import NativeUnavailable, load_native
from qvl.kernels.on_cpu import linear_codes, linear_floats, linear_pairs
from qvl.kernels.on_cpu.paged_attention import TYPES, Plan
from qvl.layers.attention import Heads, KVCache

SOURCE = Path(__file__).with_name("all_layers.c")
MOST = linear_floats.SEVERAL  # rows of a step; with more, what is saved between the parts goes unnoticed
BITS: dict[str | None, int] = {"int8": 8, "int4": 4}
_P, _L, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


@dataclass(frozen=True, slots=True)
class Sizes:
    """A decoder's."""

    hidden: int
    inner: int  # of its MLP
    heads: Heads
    eps: float


@dataclass(frozen=True, slots=True)
class Products:
    """The function that multiplies with all matrices of the layers, which are held in `form`; None: as loaded."""

    function: int  # its address
    form: str | None
    split: bool = False  # see linear_floats.c
    most: int = MOST  # rows; for more, another one was chosen

    @property
    def bits(self) -> int:
        """Of a code; 0 for numbers."""
        return BITS.get(self.form, 0)

    def scratch(self, rows: int, width: int) -> int:
        """Floats that it needs for so many rows of x."""
        if self.form is None:
            return rows * (width + linear_floats.GROUP)
        library = (linear_pairs if self.form == "pairs" else linear_codes).kernels().library
        assert library is not None
        if self.form == "pairs":
            num_bytes: int = library.qvl_pairs_scratch(rows, width)
        else:
            num_bytes = library.qvl_quantised_scratch(rows, width + 8 * linear_codes.BLOCK_BYTES // self.bits)
        return num_bytes // 4 + 1


class _Decoder(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("plain", "coded")),
        *((name, _L) for name in ("split", "bits", "layers", "hidden", "heads", "kv_heads", "dim", "inner", "type")),
        *((name, _F) for name in ("eps", "scale")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("layers", "last_norm", "cosine", "sine", "x", "out", "slots", "table", "lengths")),
        ("memory", _P),
        *((name, _L) for name in ("rows", "table_stride", "block_size", "splits", "scratch", "threads")),
    ]


class Table:
    """Where every layer's weights and cache lie: the structs `layer` of all_layers.c, one after the other. It keeps the
    weights' memory, and whoever owns the cache keeps that."""

    def __init__(self, layers: Sequence[Sequence[Tensor | None]], kv_cache: KVCache) -> None:
        tensors = [tensor for own, kv in zip(layers, kv_cache, strict=True) for tensor in (*own, *kv)]
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        self.pointers = (_P * len(addresses))(*addresses)
        self.num_layers, self.cache_dtype = len(kv_cache), kv_cache[0][0].dtype
        self._memory = [tensor.data for own in layers for tensor in own if tensor is not None]


class CpuDecode:
    """The call for one decoder."""

    def __init__(self, library: Any, sizes: Sizes, products: Products) -> None:
        self.library = library
        self.sizes = sizes
        self.products = products

    def takes(self, rows: int, plan: Any) -> TypeGuard[Plan]:
        """Whether a step was planned for compiled attention, is of decodes alone, and few enough."""
        return isinstance(plan, Plan) and 0 < rows <= self.products.most and plan.num_decodes == rows

    def run(
        self,
        table: Table,
        last_norm: Tensor,
        x: Tensor,  # fp32 [n, hidden], overwritten
        angles: tuple[Tensor, Tensor],  # cos, sin fp32 [n, 1, head_dim]
        plan: Plan,
    ) -> Tensor:
        """x after all layers and the last norm [n, hidden]; the caches of the table gain n tokens."""
        x, cos, sin = x.contiguous(), *(angle.contiguous() for angle in angles)
        rows, out = len(x), torch.empty_like(x)
        decoder = self._decoder(table)
        widest = max(self.sizes.hidden, self.sizes.inner, self.sizes.heads.num_heads * self.sizes.heads.head_dim)
        scratch = self.products.scratch(rows, widest)
        memory = torch.empty(self.library.qvl_decode_memory(decoder, rows, plan.splits, scratch))
        step = _Step(
            ctypes.addressof(table.pointers), last_norm.data_ptr(), cos.data_ptr(), sin.data_ptr(), x.data_ptr(),
            out.data_ptr(), plan.slots.data_ptr(), plan.table.data_ptr(), plan.lengths.data_ptr(), memory.data_ptr(),
            rows, plan.table.stride(0), plan.block_size, plan.splits, scratch, torch.get_num_threads(),
        )  # fmt: skip
        self.library.qvl_decode(decoder, step)
        return out

    def _decoder(self, table: Table) -> _Decoder:
        sizes, products = self.sizes, self.products
        plain, coded = (None, products.function) if products.bits else (products.function, None)
        heads = sizes.heads
        return _Decoder(
            plain, coded, products.split, products.bits, table.num_layers, sizes.hidden, heads.num_heads,
            heads.num_kv_heads, heads.head_dim, sizes.inner, TYPES[table.cache_dtype], sizes.eps, heads.head_dim**-0.5,
        )  # fmt: skip


def choose(sizes: Sizes, dtype: torch.dtype, form: str | None) -> CpuDecode | None:
    """The call for decoders whose matrices are held in `form`, or have `dtype` as they were loaded; None where one of
    its parts is not compiled, or another product is faster for few rows.
    """
    library = decode_library()
    products = compiled_products(dtype, form)
    return None if library is None or products is None else CpuDecode(library, sizes, products)


@functools.cache
def decode_library() -> Any | None:
    """The compiled library with its signatures set, or None (the linear kernels tell the operator why)."""
    if cpu_kernels() is None:  # whose functions it calls
        return None
    try:
        library = load_native(SOURCE)
    except NativeUnavailable:
        return None
    library.qvl_decode_memory.argtypes = (ctypes.POINTER(_Decoder), _L, _L, _L)
    library.qvl_decode_memory.restype = _L
    library.qvl_decode.argtypes = (ctypes.POINTER(_Decoder), ctypes.POINTER(_Step))
    library.qvl_decode.restype = None
    return library


@functools.cache
def compiled_products(dtype: torch.dtype, form: str | None) -> Products | None:
    """What multiplies with such matrices where it is compiled and chosen for few rows."""
    if form in BITS:
        library = linear_codes.kernels().library
        return None if library is None else Products(_address(library.qvl_quantised_linear), form)
    if form == "pairs":
        library = linear_pairs.kernels().library
        return None if library is None else Products(_address(library.qvl_linear_pairs), form)
    if form is not None:
        return None
    chosen = linear_floats.choose_cpu_linear(dtype)
    try:
        if chosen.few is not linear_floats.native_product(dtype):
            return None
        function = getattr(load_native(linear_floats.SOURCE), linear_floats.NAMES[dtype])
    except NativeUnavailable:
        return None
    most = MOST if chosen.several is chosen.few else linear_floats.FEW
    return Products(_address(function), None, split=dtype == torch.bfloat16, most=most)


def _address(function: Any) -> int:
    address = ctypes.cast(function, _P).value
    assert address is not None
    return address
