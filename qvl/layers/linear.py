"""Linear layers whose rows may be several projections of the checkpoint stored as one matrix.

Knows its weight (numbers as the checkpoint has them or in pairs, or codes of few bits), its bias and how many rows each
part has. Does not know how the product is computed on a device: that is `qvl.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvl.kernels.few_rows import sums_of_few
from qvl.kernels.fp8 import Fp8Matrix, Rounded
from qvl.kernels.fused import quick_gelu
from qvl.kernels.linear import Matrix, empty_matrix, linear
from qvl.kernels.on_cpu.linear_codes import QuantisedMatrix
from qvl.kernels.on_cpu.linear_pairs import ROWS as TILE_ROWS
from qvl.kernels.on_cpu.linear_pairs import PairMatrix
from qvl.kernels.sums import Sums


class Linear(nn.Module):
    """y = x W^T + b with W [sum(parts), in_features].

    `parts` are the row counts of the merged projections in order (q, k, v or gate, up); an ordinary layer has one.
    The matrix has `dtype`, the bias the dtype of the activations. After `hold` there is no `weight`: `matrix` holds its
    numbers in pairs, or codes, and its tensors are parameters, `numbers` or `codes` and `scales`.
    """

    def __init__(
        self,
        in_features: int,
        parts: int | Sequence[int],
        *,
        bias: bool,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.parts = (parts,) if isinstance(parts, int) else tuple(parts)
        self.in_features = in_features
        rows = sum(self.parts)
        self.weight: nn.Parameter | None = _constant(torch.empty(rows, in_features, dtype=dtype, device="meta"))
        self.bias = _constant(torch.empty(rows, dtype=compute_dtype, device="meta")) if bias else None
        self.matrix: Matrix | None = None

    def hold(self, form: str, device: torch.device | str) -> None:
        """Hold "pairs" of numbers or codes ("int8", "int4" or "fp8") from now on; `weight` is given up."""
        self.weight = None
        self.matrix = empty_matrix(form, sum(self.parts), self.in_features, device)
        if isinstance(self.matrix, PairMatrix):
            self.numbers = _constant(self.matrix.numbers)
        else:
            self.codes, self.scales = _constant(self.matrix.codes), _constant(self.matrix.scales)

    @property
    def eight_bits(self) -> bool:
        """It takes activations in fp8, so whoever computes them may round them at once."""
        return isinstance(self.matrix, Fp8Matrix)

    def forward(self, x: Tensor | Rounded) -> Tensor:  # [n, in_features] -> [n, sum(parts)]
        if isinstance(self.matrix, Fp8Matrix):
            return self.matrix.product(x, self.bias)
        assert isinstance(x, Tensor)
        if self.matrix is not None:
            return self.matrix.product(x, self.bias)
        assert self.weight is not None
        return linear(x, self.weight, self.bias)

    def sums(self, x: Tensor | Rounded) -> Tensor | Sums:  # [n, in_features] -> [n, sum(parts)]
        """The same for who finishes it, where that is faster."""
        if isinstance(self.matrix, Fp8Matrix):
            return self.matrix.sums(x, self.bias)
        assert isinstance(x, Tensor)
        if self.weight is not None and (few := sums_of_few(x, self.weight, self.bias)) is not None:
            return few
        return self(x)

    def of_quick_gelu(self, x: Tensor) -> Tensor:  # [n, in_features] -> [n, sum(parts)]
        """The same for quick_gelu(x); x may be overwritten."""
        if isinstance(self.matrix, QuantisedMatrix | PairMatrix):
            return self.matrix.product(x, self.bias, gelu=True)
        return self(quick_gelu(x))

    @property
    def part_rows(self) -> int | None:
        """Where `part` may begin: at a multiple of this; None: there are no parts of codes."""
        if isinstance(self.matrix, PairMatrix):
            return TILE_ROWS
        return 1 if self.matrix is None else None

    def part(self, x: Tensor, rows: slice) -> Tensor:  # [n, in_features] -> [n, rows of the slice]
        """The columns `rows` of the result alone; not for codes."""
        bias = None if self.bias is None else self.bias[rows]
        if isinstance(self.matrix, PairMatrix):
            tiles = self.matrix.numbers[rows.start // TILE_ROWS : -(-rows.stop // TILE_ROWS)]
            return PairMatrix(rows.stop - rows.start, self.in_features, tiles).product(x, bias)
        assert self.weight is not None
        return linear(x, self.weight[rows], bias)

    def rows(self, ids: Tensor) -> Tensor:  # int [n] -> [n, in_features]
        """Single rows of the matrix: what an embedding is."""
        if self.matrix is not None:
            return self.matrix.read(ids)
        assert self.weight is not None
        return F.embedding(ids, self.weight)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
