"""Matrices of bf16 numbers in pairs on a CPU: how they are stored, written, read and multiplied with.

For processors that multiply pairs of bf16 fast. A matrix is turned once, while it is loaded, and only that form is
kept; activations are rounded to bf16 on their way in, sums are fp32. Knows the layout and the same arithmetic in
torch. Does not know layers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvl.kernels.fused import quick_gelu
from qvl.kernels.on_cpu.large_pages import in_large_pages

ROWS, MULTIPLE = 16, 32  # rows of a tile; what the width is filled up to: 16 pairs of 16 rows fill a register of AMX
PANEL_NUMBERS = 2 * 1024 * 1024


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
        write_with_torch(self, first, values)

    def read(self, ids: Tensor) -> Tensor:
        """The rows `ids` (int [n]) as fp32 [n, width]."""
        return self.numbers[ids // ROWS, :, ids % ROWS].flatten(1)[:, : self.width].float()

    def product(
        self, x: Tensor, bias: Tensor | None, gelu: bool = False
    ) -> Tensor:  # fp32 [n, width] -> fp32 [n, rows]
        """x, rounded to bf16, times the transpose of this matrix, plus bias.

        With `gelu` it is quick_gelu(x) that is multiplied: activated while it is rounded, so that nobody writes it.
        """
        return product_with_torch(self, quick_gelu(x) if gelu else x, bias)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled library, or None where there is none; and why."""

    library: Any | None
    reason: str


@functools.cache
def kernels() -> Kernels:
    """What multiplies pairs here. Without a library a matrix is better held row by row, as `linear_floats` has it."""
    return Kernels(None, "no compiled product for pairs of bf16")


def product_with_torch(matrix: PairMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
    """`PairMatrix.product` without a compiled library: some rows at a time in fp32."""
    step = max(1, PANEL_NUMBERS // matrix.width)
    x = x.bfloat16().float()
    out = torch.empty(x.shape[0], matrix.rows)
    for start in range(0, matrix.rows, step):
        ids = torch.arange(start, min(start + step, matrix.rows))
        out[:, start : start + step] = x @ matrix.read(ids).T
    return out if bias is None else out.add_(bias)


def write_with_torch(matrix: PairMatrix, first: int, values: Tensor) -> None:
    """`PairMatrix.write` without a compiled library."""
    rows = torch.arange(first, first + values.shape[0])
    padded = torch.zeros(values.shape[0], matrix.padded_width, dtype=torch.bfloat16)
    padded[:, : matrix.width] = values
    matrix.numbers[rows // ROWS, :, rows % ROWS] = padded.unflatten(-1, (-1, 2))
