"""Root-mean-square and layer normalisation.

Knows the arithmetic and that the sum with the residual belongs to it, so that a device may fuse the two. Does not
know where in a network it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qvl.kernels.fp8 import Rounded
from qvl.kernels.fused import add_layer_norm, add_rms_norm
from qvl.kernels.sums import Sums


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the mean square is taken in fp32."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)

    def forward(
        self, hidden_states: Tensor | Sums, residual: Tensor | None = None, eight_bits: bool = False
    ) -> tuple[Tensor | Rounded, Tensor]:
        """(norm(hidden_states + residual), hidden_states + residual), both [n, size]; may overwrite `residual`.

        Without a residual the second is hidden_states itself. `eight_bits`: the matrix behind takes the norm in fp8.
        """
        return add_rms_norm(hidden_states, residual, self.weight, self.eps, eight_bits)


class LayerNorm(nn.Module):
    """Layer normalisation with weight and bias over the last axis."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)

    def forward(self, hidden_states: Tensor, delta: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The norm of hidden_states [n, size], to which `delta` is added in place first; in `out` if given."""
        return add_layer_norm(hidden_states, delta, self.weight, self.bias, self.eps, out)
