"""Products of 2 to 64 rows: whether there is a kernel for them here, and which products it takes.

Knows that it is tried out once. Does not know which layer asks.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor

from qvl.kernels.gpu import HOPPER, capability_of, gpu_problem, tried_out
from qvl.kernels.sums import Sums

MOST = 64
SLOWER = "torch's products are used instead: a token of 2 to 64 requests at a time takes about 10 % longer"


class FewRows(Protocol):
    """`qvl.kernels.on_gpu.linear_few`, as it is used; a test may put something else there."""

    def takes(self, weight: Tensor, gated: bool) -> bool: ...

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sums: ...

    def gated_product(self, x: Tensor, weight: Tensor) -> Tensor: ...


def sums_of_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Sums | None:
    """x [n, k] times the transpose of `weight`, plus bias; None where something else has to compute it."""
    kernel = kernel_for(x, weight, False)
    return None if kernel is None else kernel.product(x, weight, bias)


def gated_few(x: Tensor, weight: Tensor) -> Tensor | None:
    """SiLU of x times the first half of `weight`, times x times the second half; None as above."""
    kernel = kernel_for(x, weight, True)
    return None if kernel is None else kernel.gated_product(x, weight)


def kernel_for(x: Tensor, weight: Tensor, gated: bool) -> FewRows | None:
    """The kernel, where it runs and takes this product."""
    if not (x.is_cuda and 2 <= x.shape[0] <= MOST and x.is_contiguous()):
        return None
    kernel = few_rows(x.device, x.dtype)
    return kernel if kernel is not None and kernel.takes(weight, gated) else None


@functools.cache
def few_rows(device: torch.device, dtype: torch.dtype) -> FewRows | None:
    """`qvl.kernels.on_gpu.linear_few` where it runs, tried out once; warns when it should and does not."""
    if capability_of(device) != HOPPER or dtype not in (torch.bfloat16, torch.float16) or gpu_problem() is not None:
        return None

    def trial(kernel: Any) -> str | None:
        return kernel.problem_of(device, dtype)

    return tried_out("linear_few", "the kernel for products of a few rows", trial, SLOWER)
