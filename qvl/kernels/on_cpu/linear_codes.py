"""Matrices of 8- and 4-bit codes on a CPU: how they are stored, written, read and multiplied with.

8 bits: a scale per row, and activations rounded to 8 bits per token (W8A8). 4 bits: a step per row and 128 numbers,
chosen for the least square error; activations are rounded to 8 bits on their way in as well. Knows the compiled
kernels, the layout of their codes and the same arithmetic in torch. Does not know layers.
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

SOURCE = Path(__file__).with_name("linear_codes.c")
PORTABLE = ("-DQVL_PORTABLE=16",)
ROWS, BLOCK_BYTES, SPAN = 16, 64, 512  # as in the C files: rows of a tile, bytes of a row in a block, one scale of x
STEP_PARTS = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6)  # of the step that just reaches the largest number
SMALLEST = 1e-30
_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int

_log = logging.getLogger("qvl.kernels")


@dataclass(frozen=True, slots=True)
class QuantisedMatrix:
    """A matrix [rows, width] as codes and scales; all zero until `write`.

    `codes` int8 [tiles, blocks, 16, 16, 4]: sixteen rows stand in a tile, four bytes of every row and then the next
    four, 64 of each in a block. With 8 bits a byte is a number; with 4, byte i holds number i in its low half and
    64 + i in its high half, both plus 8. `scales`: fp32 [tiles, 16] of whole rows, or fp16 [tiles, blocks, 16] of
    blocks. Rows and width are filled up with zeros.
    """

    bits: int
    rows: int
    width: int
    codes: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, bits: int, rows: int, width: int) -> QuantisedMatrix:
        assert bits in (4, 8), bits
        tiles, blocks = -(-rows // ROWS), -(-width * bits // (8 * BLOCK_BYTES))
        codes = in_large_pages(torch.empty(tiles, blocks, BLOCK_BYTES // 4, ROWS, 4, dtype=torch.int8)).zero_()
        scales = torch.zeros(tiles, ROWS) if bits == 8 else torch.zeros(tiles, blocks, ROWS, dtype=torch.float16)
        return cls(bits, rows, width, codes, scales)

    @property
    def padded_width(self) -> int:
        """Numbers of a row with its filling."""
        return self.codes.shape[1] * BLOCK_BYTES * 8 // self.bits

    def write(self, first: int, values: Tensor) -> None:
        """Rows [first, first + n) from `values` [n, width] of any float dtype."""
        values = values.float().contiguous()
        assert values.shape[1] == self.width
        assert first + values.shape[0] <= self.rows
        library = kernels().library
        if library is None:
            write_with_torch(self, first, values)
            return
        function = library.qvl_quantise8 if self.bits == 8 else library.qvl_quantise4
        function(
            values.data_ptr(), self.codes.data_ptr(), self.scales.data_ptr(), first, values.shape[0], self.width,
            self.padded_width, torch.get_num_threads(),
        )  # fmt: skip

    def read(self, ids: Tensor) -> Tensor:
        """The rows `ids` (int [n]) as fp32 [n, width]: what the codes stand for."""
        tile, lane = ids // ROWS, ids % ROWS
        codes = self.codes[tile, :, :, lane].flatten(2)  # [n, blocks, 64]
        if self.bits == 8:
            return codes.flatten(1)[:, : self.width] * self.scales[tile, lane, None]
        both = codes.view(torch.uint8)
        numbers = torch.cat((both & 15, both >> 4), dim=-1).float() - 8
        return (numbers * self.scales[tile, :, lane, None].float()).flatten(1)[:, : self.width]

    def product(
        self, x: Tensor, bias: Tensor | None, gelu: bool = False
    ) -> Tensor:  # fp32 [n, width] -> fp32 [n, rows]
        """x times the transpose of this matrix, plus bias; not a number wherever a row of x is not finite.

        With `gelu` it is quick_gelu(x) that is multiplied: activated while it is rounded, so that nobody writes it.
        """
        library = kernels().library
        if library is None:
            return product_by_panels(self, quick_gelu(x) if gelu else x, bias)
        return compiled_product(library, self, x, bias, gelu)


@functools.cache
def kernels() -> Kernels:
    """What multiplies here; decided once per process, by trying: what computes wrong numbers is not used."""
    try:
        library = open_library()
        if computes_right(library):
            return Kernels(library, f"compiled kernel ({path_of(library)}), activations rounded to 8 bits")
        _log.warning("the %s kernels compute wrong numbers here; the portable ones are slower", path_of(library))
        library = open_library(PORTABLE)
        if computes_right(library):
            return Kernels(library, "compiled kernel (portable: the processor's own fails its test)")
        problem = "the compiled kernels compute wrong numbers"
    except NativeUnavailable as error:
        problem = str(error)
    _log.warning("quantised weights are widened by torch, which makes them slower than 16-bit ones: %s", problem)
    return Kernels(None, f"torch, codes widened by panels ({problem})")


def open_library(flags: tuple[str, ...] = ()) -> Any:
    """The library with its signatures set. Raises NativeUnavailable."""
    library = load_kernels(SOURCE, flags)
    library.qvl_quantised_linear.argtypes = (_I, _I, _P, _L, _P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _I)
    for name in ("qvl_quantise8", "qvl_quantise4"):
        getattr(library, name).argtypes = (_P, _P, _P, _L, _L, _L, _L, _I)
        getattr(library, name).restype = None
    library.qvl_quantised_linear.restype = None
    library.qvl_quantised_scratch.argtypes = (_L, _L)
    library.qvl_quantised_scratch.restype = _L
    library.qvl_quantised_path.restype = ctypes.c_char_p
    return library


def path_of(library: Any) -> str:
    """The instructions that it multiplies with: "AVX2", "AVX-VNNI", "AVX-512 VNNI" (and AMX) or "portable"."""
    name: bytes = library.qvl_quantised_path()
    return name.decode()


def compiled_product(
    library: Any, matrix: QuantisedMatrix, x: Tensor, bias: Tensor | None, gelu: bool = False
) -> Tensor:
    """`QuantisedMatrix.product` by a compiled library."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    count = x.shape[0]
    assert x.dtype == torch.float32, x.dtype
    out = torch.empty(count, matrix.rows)
    scratch = torch.empty(library.qvl_quantised_scratch(count, matrix.padded_width), dtype=torch.uint8)
    scales = matrix.scales.data_ptr()
    threads = threads_for(count, matrix.rows, matrix.width, torch.get_num_threads())
    library.qvl_quantised_linear(
        matrix.bits, gelu, x.data_ptr(), x.stride(0), matrix.codes.data_ptr(), scales if matrix.bits == 4 else None,
        scales if matrix.bits == 8 else None, None if bias is None else bias.data_ptr(), out.data_ptr(),
        scratch.data_ptr(), count, matrix.rows, matrix.width, matrix.padded_width, threads,
    )  # fmt: skip
    return out


def computes_right(library: Any) -> bool:
    """A few products with the largest codes of both signs, against the same arithmetic in torch."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, 6, 600, 7), (8, 4, 64, 1), (8, 37, 1100, 50), (4, 6, 700, 7), (4, 5, 128, 2), (4, 37, 1100, 50))
    for bits, rows, width, count in sizes:
        matrix = QuantisedMatrix.empty(bits, rows, width)
        values = torch.randn(rows, width, generator=generator).sign() * (1 + torch.arange(width) % 3)
        write_with_torch(matrix, 0, values)
        x = torch.randn(count, width, generator=generator).sign()
        exact = rounded(x).double() @ matrix.read(torch.arange(rows)).double().T
        bound = x.abs().double() @ values.abs().double().T
        if not ((compiled_product(library, matrix, x, None) - exact).abs() <= 1e-5 * bound).all():
            return False
    return True


def rounded(x: Tensor) -> Tensor:  # fp32 [n, width] -> fp32 [n, width]
    """x as the kernels see it: every 512 numbers of a row have 8 bits and one scale."""
    parts = []
    for part in x.split(SPAN, dim=-1):
        most = part.abs().amax(-1, keepdim=True)
        back = torch.where(most > SMALLEST, 127 / most, torch.zeros(()))
        parts.append((part * back).round() * (most / 127))
    return torch.cat(parts, dim=-1)


def write_with_torch(matrix: QuantisedMatrix, first: int, values: Tensor) -> None:
    """`QuantisedMatrix.write` without a compiled library."""
    rows = torch.arange(first, first + values.shape[0])
    tile, lane = rows // ROWS, rows % ROWS
    padded = torch.zeros(values.shape[0], matrix.padded_width)
    padded[:, : matrix.width] = values
    if matrix.bits == 8:
        most = padded.abs().amax(-1)
        codes = (padded * torch.where(most > SMALLEST, 127 / most, torch.zeros(()))[:, None]).round()
        matrix.codes[tile, :, :, lane] = codes.to(torch.int8).unflatten(-1, (-1, BLOCK_BYTES // 4, 4))
        matrix.scales[tile, lane] = most / 127
        return
    blocks = padded.unflatten(-1, (-1, 2 * BLOCK_BYTES))  # [n, blocks, 128]
    step = best_steps(blocks)
    low, high = (codes_of(blocks, step) + 8).to(torch.uint8).chunk(2, dim=-1)
    matrix.codes[tile, :, :, lane] = (low | high << 4).view(torch.int8).unflatten(-1, (-1, 4))
    matrix.scales[tile, :, lane] = step


def best_steps(blocks: Tensor) -> Tensor:  # [n, blocks, 128] -> fp16 [n, blocks]
    """The step of each block with the least square error. It is negative where the largest number is positive: the
    codes reach from -8 to 7.
    """
    low, high = (-blocks.amin(-1)).clamp_min(0), blocks.amax(-1).clamp_min(0)
    reach = torch.where(low > high, low, -high) / 8
    best, least = torch.zeros_like(reach), torch.full_like(reach, float("inf"))
    for part in STEP_PARTS:
        step = (reach * part).half().float()
        error = (blocks - codes_of(blocks, step) * step[..., None]).square().sum(-1)
        better = (error < least) & (step != 0)
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best.half()


def codes_of(blocks: Tensor, step: Tensor) -> Tensor:
    """The nearest of -8..7; 0 where the step is."""
    step = step.float()[..., None]
    return torch.where(step != 0, blocks / step, torch.zeros(())).round().clamp(-8, 7)
