"""The product of activations with weights, whatever device and dtypes, and the matrices that are held in another form.

Knows which file of this package computes it. Does not know which layer asks.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels.few_rows import MOST, few_rows
from qvl.kernels.fp8 import Fp8Matrix, require_fp8
from qvl.kernels.fused import quick_gelu
from qvl.kernels.gpu import HOPPER, capability_of, early_on, gpu_problem, tried_out
from qvl.kernels.on_cpu import linear_codes, linear_pairs
from qvl.kernels.on_cpu.linear_codes import QuantisedMatrix
from qvl.kernels.on_cpu.linear_floats import choose_cpu_linear
from qvl.kernels.on_cpu.linear_pairs import PairMatrix

Matrix: TypeAlias = QuantisedMatrix | Fp8Matrix | PairMatrix


class OneRow(Protocol):
    """`qvl.kernels.on_gpu.linear_row`, as it is used; a test may put something else there."""

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        scales: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        bias: Tensor | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
        early: bool = False,
    ) -> Tensor: ...


class ManyRows(Protocol):
    """`qvl.kernels.on_gpu.linear_many`, as it is used; a test may put something else there."""

    def silu_product(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def quick_gelu_product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor: ...


MULTIPLE = 16  # of the width of a matrix, so that 16 bytes are read at a time
WRONG = 2e-2
MANY = 512  # rows from which on gate and up are multiplied with SiLU inside
MANY_PATCHES = 2048  # and the tower's first layer with its activation: it has less to multiply for each tile
APART = "torch's product is used instead, and SiLU by itself: a prompt takes some 4 % longer"
SLOWER = "torch's products are used instead: a token of a single request takes about 15 % longer"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, in] times weight [out, in] transposed, plus bias [out]: [n, out] in the dtype of x."""
    if weight.device.type == "cpu":
        return choose_cpu_linear(weight.dtype)(x, weight, bias)
    if takes_one(x) and (kernel := one_row(x.device, x.dtype)) is not None:
        return kernel.product(x, weight, bias=bias)
    return F.linear(x, weight, bias)


def takes_one(x: Tensor) -> bool:
    """Whether x is one row that the kernel for one can take."""
    return x.is_cuda and x.shape[0] == 1 and x.shape[1] % MULTIPLE == 0 and x.is_contiguous()


@functools.cache
def one_row(device: torch.device, dtype: torch.dtype) -> OneRow | None:
    """`qvl.kernels.on_gpu.linear_row` when it runs there, tried out once; warns when it does not."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or gpu_problem() is not None:
        return None

    def trial(kernel: Any) -> str | None:
        return kernel.problem_of(device, dtype, early_on(capability_of(device)))

    return tried_out("linear_row", "the kernel for products of one row", trial, SLOWER)


def gated_many(x: Tensor, weight: Tensor) -> Tensor | None:  # [n, in], [2 * size, in] -> [n, size]
    """silu(x times the first half) * (x times the second half), where one kernel for it is better than two."""
    kernel = many_rows(x.device, x.dtype) if joins(weight, len(x)) else None
    return None if kernel is None else kernel.silu_product(x, weight)


def joins(weight: Tensor, rows: int) -> bool:
    """Whether so many rows are multiplied with gate and up, `weight` [2 * size, in], by a kernel that joins both."""
    if rows < MANY or weight.shape[0] % (2 * MULTIPLE) or weight.shape[1] % MULTIPLE:
        return False
    return many_rows(weight.device, weight.dtype) is not None


def quick_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # [n, in], [size, in] -> [n, size]
    """quick_gelu(x times weight + bias)."""
    aligned = weight.shape[0] % MULTIPLE == 0 and weight.shape[1] % MULTIPLE == 0
    kernel = many_rows(x.device, x.dtype) if len(x) >= MANY_PATCHES and aligned else None
    if kernel is None:
        return quick_gelu(linear(x, weight, bias))
    return kernel.quick_gelu_product(x, weight, bias)


@functools.cache
def many_rows(device: torch.device, dtype: torch.dtype) -> ManyRows | None:
    """`qvl.kernels.on_gpu.linear_many` where it runs, tried out once; warns when it should run and does not."""
    if capability_of(device) != HOPPER or dtype not in (torch.bfloat16, torch.float16) or gpu_problem() is not None:
        return None

    def trial(kernel: Any) -> str | None:
        return kernel.problem_of(device, dtype)

    return tried_out("linear_many", "the kernel for products of many rows", trial, APART)


def empty_matrix(form: str, rows: int, width: int, device: torch.device | str) -> Matrix:
    """A matrix whose numbers will be held as "int8", "int4" or "pairs" (on a CPU) or "fp8"."""
    if form == "fp8":
        return Fp8Matrix.empty(rows, width, device)
    if form == "pairs":
        return PairMatrix.empty(rows, width)
    return QuantisedMatrix.empty({"int8": 8, "int4": 4}[form], rows, width)


def form_of_numbers(dtype: torch.dtype, device: torch.device) -> str | None:
    """What weights of `dtype` that nothing rounds are held in there; None: row by row, as a checkpoint has them."""
    fast = device.type == "cpu" and dtype == torch.bfloat16 and linear_pairs.kernels().library is not None
    return "pairs" if fast else None


def compute_dtype_for(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of activations beside weights of `dtype`: fp32 on a CPU, the weights' own elsewhere."""
    return torch.float32 if device.type == "cpu" else dtype


def describe_linear(dtype: torch.dtype, device: torch.device, quantization: str = "none") -> str:
    """How products are computed there, in words; this makes the choices (and builds the kernels) if need be."""
    if device.type == "cpu" and quantization != "fp8":
        pairs = form_of_numbers(dtype, device) == "pairs"
        plain = linear_pairs.kernels().reason if pairs else choose_cpu_linear(dtype).reason
        if quantization == "none":
            return plain
        return f"{quantization}: {linear_codes.kernels().reason}; the rest: {plain}"
    plain = f"torch {dtype}" if one_row(device, dtype) is None else f"triton for one row, torch {dtype} for more"
    if few_rows(device, dtype) is not None:
        plain += f", triton for 2 to {MOST} rows"
    if many_rows(device, dtype) is not None:  # fp8 leaves the tower to it
        plain += f", triton for {MANY} rows or more with an activation behind"
    if quantization == "none":
        return plain
    return f"{require_fp8(device)}; {plain}"
