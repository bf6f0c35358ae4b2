"""What matrices held in forms of our own share on a CPU: the library that multiplies with them, and torch in its place.

Knows neither form.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qvl.kernels.native import load_native
from qvl.kernels.on_cpu.matrix_registers import told_to_do_without

# A sum is rounded alike whatever loop the compiler puts it into; and where a loop of few instructions begins decides
# about a tenth of the time of a single row.
FLAGS = ("-ffp-contract=off", "-falign-loops=64")
WITHOUT_AMX = ("-DQVL_WITHOUT_AMX",)
PANEL_NUMBERS = 2 * 1024 * 1024


class Matrix(Protocol):
    """`linear_codes.QuantisedMatrix` and `linear_pairs.PairMatrix`."""

    @property
    def rows(self) -> int: ...

    @property
    def width(self) -> int: ...

    def read(self, ids: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled library, or None where there is none; and why."""

    library: Any | None
    reason: str


def load_kernels(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library compiled from `source`, without AMX where we are told so. Raises NativeUnavailable."""
    limits = WITHOUT_AMX if told_to_do_without() else ()
    return load_native(source, (*FLAGS, *limits, *flags))


def product_by_panels(matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor:  # fp32 [n, width] -> fp32 [n, rows]
    """x times the transpose of the matrix, plus bias, by torch: some rows at a time in fp32, x as it is."""
    step = max(1, PANEL_NUMBERS // matrix.width)
    out = torch.empty(x.shape[0], matrix.rows)
    for start in range(0, matrix.rows, step):
        ids = torch.arange(start, min(start + step, matrix.rows))
        out[:, start : start + step] = x @ matrix.read(ids).T
    return out if bias is None else out.add_(bias)
