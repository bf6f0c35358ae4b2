"""bf16 in tiles of pairs: what is written is read again, and products against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qvl.kernels.on_cpu import linear_pairs
from qvl.kernels.on_cpu.linear_pairs import PairMatrix, product_with_torch

SHAPES = ((1, 1), (3, 15), (70, 67), (37, 1000), (130, 64), (8, 4111))


def hold(values: Tensor) -> PairMatrix:
    matrix = PairMatrix.empty(*values.shape)
    matrix.write(0, values)
    return matrix


def everything(matrix: PairMatrix) -> Tensor:
    return matrix.read(torch.arange(matrix.rows))


def error(found: Tensor, x: Tensor, values: Tensor, bias: Tensor) -> float:
    """The largest error beside the bound of rounding errors, once both factors are rounded to bf16."""
    x, values = x.bfloat16().double(), values.bfloat16().double()
    exact, bound = x @ values.T + bias, x.abs() @ values.abs().T + bias.abs()
    return ((found - exact).abs() / bound).max().item()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_read(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.randn(shape).to(dtype)
    matrix = hold(values)
    assert torch.equal(everything(matrix), values.bfloat16().float())
    assert matrix.numbers.numel() == -(-shape[0] // 16) * 16 * matrix.padded_width
    assert matrix.numbers.count_nonzero() == values.count_nonzero()  # the filling is zero


def test_rows_may_come_in_any_portions() -> None:
    values = torch.randn(23, 300).bfloat16()
    matrix = PairMatrix.empty(23, 300)
    for first, stop in ((17, 23), (0, 3), (3, 4), (4, 17)):
        matrix.write(first, values[first:stop])
    assert torch.equal(matrix.numbers, hold(values).numbers)
    ids = torch.tensor([22, 0, 5, 5])
    assert torch.equal(matrix.read(ids), values[ids].float())


def test_torch_multiplies_in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_pairs, "PANEL_NUMBERS", 1000)
    values, x, bias = torch.randn(33, 96), torch.randn(5, 96), torch.randn(33)
    assert error(product_with_torch(hold(values), x, bias), x, values, bias) < 2e-6
