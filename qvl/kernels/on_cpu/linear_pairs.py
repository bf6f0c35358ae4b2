"""Matrices of bf16 numbers in pairs on a CPU: how they are stored, written, read and multiplied with.

For processors that multiply pairs of bf16 fast. A matrix is turned once, while it is loaded, and only that form is
kept; activations are rounded to bf16 on their way in, sums are fp32. Knows the layout and the same arithmetic in
torch. Does not know layers.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvl.kernels.fused import quick_gelu
from qvl.kernels.native import NativeUnavailable, threads_for
from qvl.kernels.on_cpu.large_pages import in_large_pages
from qvl.kernels.on_cpu.matrices import Kernels, load_kernels, product_by_panels

SOURCE = Path(__file__).with_name("linear_pairs.c")
PORTABLE = ("-DQVL_PAIRED",)  # the same in C, for tests,
PORTABLE_AMX = (*PORTABLE, "-DQVL_PAIRED_AMX")  # and what registers for matrices do
ROWS, MULTIPLE = 16, 32  # rows of a tile; what the width is filled up to: 16 pairs of 16 rows fill a register of AMX
_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int

_log = logging.getLogger("qvl.kernels")


@dataclass(frozen=True, slots=True)
class PairMatrix:
    """A matrix [rows, width] in bf16; all zero until `write`.

    `numbers` bf16 [tiles, pairs, 16, 2]: sixteen rows stand in a tile, two numbers of every row and then the next two.
    Rows and width are filled up with zeros.
    """

    rows: int
    width: int
    numbers: Tensor

    @classmethod
    def empty(cls, rows: int, width: int) -> PairMatrix:
        tiles, pairs = -(-rows // ROWS), -(-width // MULTIPLE) * MULTIPLE // 2
        numbers = in_large_pages(torch.empty(tiles, pairs, ROWS, 2, dtype=torch.bfloat16)).zero_()
        return cls(rows, width, numbers)

    @property
    def padded_width(self) -> int:
        """Numbers of a row with its filling."""
        return 2 * self.numbers.shape[1]

    def write(self, first: int, values: Tensor) -> None:
        """Rows [first, first + n) from `values` [n, width] of any float dtype, rounded to bf16."""
        assert values.shape[1] == self.width
        assert first + values.shape[0] <= self.rows
        library = kernels().library
        if library is None:
            write_with_torch(self, first, values)
        else:
            compiled_write(library, self, first, values)

    def read(self, ids: Tensor) -> Tensor:
        """The rows `ids` (int [n]) as fp32 [n, width]."""
        return self.numbers[ids // ROWS, :, ids % ROWS].flatten(1)[:, : self.width].float()

    def product(
        self, x: Tensor, bias: Tensor | None, gelu: bool = False
    ) -> Tensor:  # fp32 [n, width] -> fp32 [n, rows]
        """x, rounded to bf16, times the transpose of this matrix, plus bias.

        With `gelu` it is quick_gelu(x) that is multiplied: activated while it is rounded, so that nobody writes it.
        """
        library = kernels().library
        if library is None:
            return product_with_torch(self, quick_gelu(x) if gelu else x, bias)
        return compiled_product(library, self, x, bias, gelu)


@functools.cache
def kernels() -> Kernels:
    """What multiplies pairs here; decided once per process, by trying. Without a library a matrix is better held row by
    row, as `linear_floats` has it.
    """
    try:
        library = open_library()
    except NativeUnavailable as error:
        return Kernels(None, str(error))
    if path_of(library) is None:
        return Kernels(None, "no fast instruction for pairs of bf16")
    if not computes_right(library):
        _log.warning("the %s kernels compute wrong numbers here; bf16 in rows is slower", path_of(library))
        return Kernels(None, "the compiled product of pairs computes wrong numbers")
    return Kernels(library, f"compiled kernel ({path_of(library)}), activations rounded to bf16")


def open_library(flags: tuple[str, ...] = ()) -> Any:
    """The library with its signatures set. Raises NativeUnavailable."""
    library = load_kernels(SOURCE, flags)
    library.qvl_pairs_path.restype = ctypes.c_char_p
    if path_of(library) is None:
        return library
    library.qvl_linear_pairs.argtypes = (_P, _L, _P, _P, _P, _P, _L, _L, _L, _I, _I)
    library.qvl_linear_pairs.restype = None
    library.qvl_write_pairs.argtypes = (_P, _P, _L, _L, _L, _I)
    library.qvl_write_pairs.restype = None
    library.qvl_pairs_scratch.argtypes = (_L, _L)
    library.qvl_pairs_scratch.restype = _L
    return library


def path_of(library: Any) -> str | None:
    """The instructions that it multiplies with, e.g. "AVX-512 BF16" or "AMX"; None where there are no fast ones."""
    name: bytes | None = library.qvl_pairs_path()
    return None if name is None else name.decode()


def compiled_product(library: Any, matrix: PairMatrix, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """`PairMatrix.product` by a compiled library."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    count = x.shape[0]
    assert x.dtype == torch.float32, x.dtype
    out = torch.empty(count, matrix.rows)
    scratch = torch.empty(library.qvl_pairs_scratch(count, matrix.width), dtype=torch.uint8)
    library.qvl_linear_pairs(
        x.data_ptr(), x.stride(0), matrix.numbers.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), scratch.data_ptr(), count, matrix.rows, matrix.width, gelu,
        threads_for(count, matrix.rows, matrix.width, torch.get_num_threads()),
    )  # fmt: skip
    return out


def compiled_write(library: Any, matrix: PairMatrix, first: int, values: Tensor) -> None:
    """`PairMatrix.write` by a compiled library."""
    values = values.bfloat16().contiguous()
    library.qvl_write_pairs(
        values.data_ptr(), matrix.numbers.data_ptr(), first, values.shape[0], matrix.width, torch.get_num_threads()
    )


def computes_right(library: Any) -> bool:
    """A few products, of one strip of rows of x and of several, against the same arithmetic in torch."""
    generator = torch.Generator().manual_seed(0)
    for rows, width, count in ((6, 600, 1), (37, 1100, 9), (70, 40, 50)):
        values, x = torch.randn(rows, width, generator=generator), torch.randn(count, width, generator=generator)
        matrix = PairMatrix.empty(rows, width)
        compiled_write(library, matrix, 0, values)
        exact = x.bfloat16().double() @ values.bfloat16().double().T
        bound = x.abs().double() @ values.abs().double().T
        if not ((compiled_product(library, matrix, x, None) - exact).abs() <= 1e-5 * bound).all():
            return False
    return True


def product_with_torch(matrix: PairMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
    """`PairMatrix.product` without a compiled library."""
    return product_by_panels(matrix, x.bfloat16().float(), bias)


def write_with_torch(matrix: PairMatrix, first: int, values: Tensor) -> None:
    """`PairMatrix.write` without a compiled library."""
    rows = torch.arange(first, first + values.shape[0])
    padded = torch.zeros(values.shape[0], matrix.padded_width, dtype=torch.bfloat16)
    padded[:, : matrix.width] = values
    matrix.numbers[rows // ROWS, :, rows % ROWS] = padded.unflatten(-1, (-1, 2))
