"""Matrices and activations of 8-bit floating-point numbers (e4m3) on GPUs that multiply them.

Weights have a scale per row, activations one per token, found while they are computed (W8A8); a few tokens are
multiplied as they are, by a kernel that reads the 8-bit weights. Knows torch's scaled products. Does not know layers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qvl.errors import ConfigError
from qvl.kernels.gpu import gpu_kernels, problem_of_trial
from qvl.kernels.sums import Sums, finished

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 1e-12
MULTIPLE = 16  # of both sides of a matrix, which the scaled product asks for
FACTOR = 2.0**-18  # of products of codes: of 29,696 of the largest, the sum still fits into fp16
WRONG = 2e-2  # relative error of the scaled product that is no rounding any more


@dataclass(frozen=True, slots=True)
class Rounded:
    """Activations [n, size] in fp8 with a scale per row."""

    codes: Tensor  # fp8 [n, size]
    scales: Tensor  # fp32 [n, 1]
    dtype: torch.dtype  # of what was rounded

    def __len__(self) -> int:
        return len(self.codes)

    @classmethod
    def empty_like(cls, x: Tensor) -> Rounded:
        scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
        return cls(torch.empty(x.shape, dtype=FP8, device=x.device), scales, x.dtype)


def round_rows(x: Tensor) -> Rounded:  # [n, size]
    """Each row with the scale that makes its largest number the largest of fp8."""
    gpu = gpu_kernels() if x.is_cuda else None
    if gpu is not None and x.is_contiguous():
        rounded: Rounded = gpu.round_rows(x)
        return rounded
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / LARGEST
    return Rounded((wide / scales).to(FP8), scales, x.dtype)


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix [rows, width] as fp8 codes and a scale per row; not a number until `write`."""

    rows: int
    width: int
    codes: Tensor  # fp8 [rows, width]
    scales: Tensor  # fp32 [rows]

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device | str) -> Fp8Matrix:
        if rows % MULTIPLE or width % MULTIPLE:
            raise ConfigError(
                f"'quantization' fp8 needs matrices whose sides are multiples of {MULTIPLE}, this model has one of "
                f"{rows} x {width}",
                param="quantization",
            )
        codes = torch.empty(rows, width, dtype=FP8, device=device)
        return cls(rows, width, codes, torch.empty(rows, dtype=torch.float32, device=device))

    def write(self, first: int, values: Tensor) -> None:
        """Rows [first, first + n) from `values` [n, width] of any float dtype, on any device."""
        rounded = round_rows(values.to(self.codes.device))
        self.codes[first : first + len(values)] = rounded.codes
        self.scales[first : first + len(values)] = rounded.scales[:, 0]

    def read(self, ids: Tensor) -> Tensor:
        """The rows `ids` (int [n]) as fp32 [n, width]: what the codes stand for."""
        return self.codes.view(torch.uint8)[ids].view(FP8).float() * self.scales[ids, None]

    def product(self, x: Tensor | Rounded, bias: Tensor | None) -> Tensor:  # [n, width] -> [n, rows]
        """x times the transpose of this matrix, plus bias; x is rounded unless it is already."""
        x = x if isinstance(x, Rounded) else round_rows(x)
        return torch._scaled_mm(
            x.codes, self.codes.T, scale_a=x.scales, scale_b=self.scales[None], bias=bias, out_dtype=x.dtype,
            use_fast_accum=True,
        )  # fmt: skip

    def sums(self, x: Tensor | Rounded, bias: Tensor | None) -> Sums:
        """The same, but for the scales: the library multiplies up to twice as fast where it does not apply them."""
        x = x if isinstance(x, Rounded) else round_rows(x)
        one, factor = factors(x.codes.device)
        out = torch._scaled_mm(
            x.codes, self.codes.T, scale_a=one, scale_b=factor, bias=None, out_dtype=x.dtype, use_fast_accum=True
        )
        return Sums(out[None], x.dtype, 1 / FACTOR, x.scales, self.scales, bias)


@functools.cache
def factors(device: torch.device) -> tuple[Tensor, Tensor]:
    """One and FACTOR there. (First asked for by the trial: a recorded graph would keep them for itself.)"""
    return torch.ones((), device=device), torch.full((), FACTOR, device=device)


def require_fp8(device: torch.device) -> str:
    """What multiplies in 8 bits there, tried out. ConfigError when nothing does."""
    problem = fp8_problem(device)
    if problem is not None:
        raise ConfigError(f"'quantization' fp8 does not run here: {problem}; leave it out", param="quantization")
    return "fp8: torch's scaled product, a scale per row of the weights and per token"


def fp8_problem(device: torch.device) -> str | None:
    """A small product tried out: what went wrong, or None."""
    return problem_of_trial("a small product", lambda: wrong_products(device))


def wrong_products(device: torch.device) -> str | None:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(32, 256, generator=generator, device=device).bfloat16()
    matrix = Fp8Matrix.empty(64, 256, device)
    matrix.write(0, torch.randn(64, 256, generator=generator, device=device))
    rounded = round_rows(x)
    exact = (rounded.codes.float() * rounded.scales) @ matrix.read(torch.arange(64, device=device)).T
    for out in (matrix.product(x, None), finished(matrix.sums(x, None))):
        error = float((out.float() - exact).norm() / exact.norm())
        if not error < WRONG:
            return f"its products are wrong (relative error {error:.1e})"
    return None
