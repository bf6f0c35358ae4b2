"""Linear layers whose rows may be several projections of the checkpoint stored as one matrix.

Knows its weight (numbers, or codes of few bits), its bias and how many rows each part has. Does not know how the
product is computed on a device: that is `qvl.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvl.kernels.few_rows import sums_of_few
from qvl.kernels.fp8 import Fp8Matrix, Rounded
from qvl.kernels.fused import quick_gelu
from qvl.kernels.linear import empty_matrix, linear
from qvl.kernels.on_cpu.linear_codes import QuantisedMatrix
from qvl.kernels.sums import Sums


class Linear(nn.Module):
    """y = x W^T + b with W [sum(parts), in_features].

    `parts` are the row counts of the merged projections in order (q, k, v or gate, up); an ordinary layer has one.
    The matrix has `dtype`, the bias the dtype of the activations. After `quantise` there is no `weight`: `matrix` holds
    codes, and `codes` and `scales` are its tensors as parameters.
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
        self.matrix: QuantisedMatrix | Fp8Matrix | None = None

    def quantise(self, form: str, device: torch.device | str) -> None:
        """Hold codes of this form ("int8", "int4" or "fp8") from now on; the matrix is given up."""
        self.weight = None
        self.matrix = empty_matrix(form, sum(self.parts), self.in_features, device)
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
        if isinstance(self.matrix, QuantisedMatrix):
            return self.matrix.product(x, self.bias, gelu=True)
        return self(quick_gelu(x))

    def part(self, x: Tensor, rows: slice) -> Tensor:  # [n, in_features] -> [n, rows of the slice]
        """The columns `rows` of the result alone; not for codes."""
        assert self.weight is not None
        return linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])

    def rows(self, ids: Tensor) -> Tensor:  # int [n] -> [n, in_features]
        """Single rows of the matrix: what an embedding is."""
        if self.matrix is not None:
            return self.matrix.read(ids)
        assert self.weight is not None
        return F.embedding(ids, self.weight)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
