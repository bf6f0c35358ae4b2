"""bf16 in tiles of pairs: what is written is read again; products, compiled and by torch, against float64."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl.kernels.fused import quick_gelu
from qvl.kernels.native import NativeUnavailable
from qvl.kernels.on_cpu import linear_pairs, matrices
from qvl.kernels.on_cpu.linear_pairs import (
    PORTABLE,
    PORTABLE_AMX,
    PairMatrix,
    compiled_product,
    compiled_write,
    computes_right,
    kernels,
    open_library,
    path_of,
    product_with_torch,
    write_with_torch,
)
from qvl.kernels.on_cpu.matrices import WITHOUT_AMX
from tests.kernels.compiled import skip_without_compiler

SHAPES = ((1, 1), (3, 15), (70, 67), (37, 1000), (130, 64), (8, 4111))
# The processor's own instructions, and in C what those for vectors and those for matrices do.
NATIVE, EMULATED, MATRICES = (), (*PORTABLE, "-O1"), (*PORTABLE_AMX, "-O1")
BUILDS = pytest.mark.parametrize(
    "flags",
    [NATIVE, WITHOUT_AMX, EMULATED, MATRICES],
    ids=["native", "without AMX", "portable", "portable AMX"],
)


def library(flags: tuple[str, ...]) -> Any:
    try:
        found = open_library(flags)
    except NativeUnavailable as error:
        skip_without_compiler(error)
    if path_of(found) is None:
        pytest.skip("no fast instruction for pairs of bf16 here")
    return found


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def hold(values: Tensor) -> PairMatrix:
    matrix = PairMatrix.empty(*values.shape)
    write_with_torch(matrix, 0, values)
    return matrix


def everything(matrix: PairMatrix) -> Tensor:
    return matrix.read(torch.arange(matrix.rows))


def error(found: Tensor, x: Tensor, values: Tensor, bias: Tensor) -> float:
    """The largest error beside the bound of rounding errors, once both factors are rounded to bf16."""
    x, values = x.bfloat16().double(), values.bfloat16().double()
    exact, bound = x @ values.T + bias, x.abs() @ values.abs().T + bias.abs()
    return ((found - exact).abs() / bound).max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_read(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.randn(shape).to(dtype)
    matrix = PairMatrix.empty(*shape)
    matrix.write(0, values)
    assert torch.equal(everything(matrix), values.bfloat16().float())
    assert matrix.numbers.numel() == -(-shape[0] // 16) * 16 * matrix.padded_width
    assert matrix.numbers.count_nonzero() == values.count_nonzero()  # the filling is zero


@BUILDS
def test_rows_may_come_in_any_portions(flags: tuple[str, ...]) -> None:
    built, values = library(flags), torch.randn(61, 300)
    whole, compiled, by_torch = hold(values), PairMatrix.empty(61, 300), PairMatrix.empty(61, 300)
    for first, stop in ((17, 55), (0, 3), (3, 4), (4, 17), (55, 55), (55, 61)):
        compiled_write(built, compiled, first, values[first:stop])
        write_with_torch(by_torch, first, values[first:stop])
    assert torch.equal(compiled.numbers, whole.numbers)
    assert torch.equal(by_torch.numbers, whole.numbers)
    ids = torch.tensor([60, 0, 5, 5])
    assert torch.equal(compiled.read(ids), values.bfloat16()[ids].float())


@BUILDS
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_exact(shape: tuple[int, int], flags: tuple[str, ...]) -> None:
    built, values, bias = library(flags), torch.randn(shape), torch.randn(shape[0])
    matrix = hold(values)
    for rows in (*range(1, 15), 16, 17, 24, 25, 32, 33, 51):
        x = torch.randn(rows, shape[1])
        assert error(compiled_product(built, matrix, x, bias), x, values, bias) < 2e-6, rows
        assert error(compiled_product(built, matrix, x, None), x, values, torch.zeros(1)) < 2e-6, rows


@BUILDS
@pytest.mark.parametrize(("out", "width"), [(45, 2600), (600, 70)])
def test_a_row_does_not_depend_on_its_company(out: int, width: int, flags: tuple[str, ...]) -> None:
    """One strip of rows of x reads all of a tile, several meet it in spans; more come in groups."""
    built, matrix = library(flags), hold(torch.randn(out, width))
    x, bias = torch.randn(293, width), torch.randn(out)
    together = compiled_product(built, matrix, x, bias)
    for rows in (*range(1, 15), 16, 17, 24, 31, 32, 33, 257):
        assert torch.equal(compiled_product(built, matrix, x[:rows], bias), together[:rows]), rows
    for rows in (2, 6, 13, 19):
        assert torch.equal(compiled_product(built, matrix, x[-rows:], bias), together[-rows:]), rows


@BUILDS
@pytest.mark.parametrize("shape", [(999, 2500), (1999, 100)], ids=["wide", "narrow"])
def test_threads_share_the_work(
    shape: tuple[int, int], flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    built, values, x = library(flags), torch.randn(shape), torch.randn(70, shape[1])
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        matrix = PairMatrix.empty(*shape)
        compiled_write(built, matrix, 0, values)
        few = [compiled_product(built, matrix, part, None) for part in x.split(7)]
        found.append((matrix.numbers, compiled_product(built, matrix, x, None), torch.cat(few)))
    for numbers, many, few in found:
        assert torch.equal(numbers, found[0][0])
        assert torch.equal(many, found[0][1])
        assert torch.equal(few, many)


@BUILDS
@pytest.mark.parametrize("width", [77, 1100])
def test_x_may_pass_an_activation_on_its_way_in(width: int, flags: tuple[str, ...]) -> None:
    """Some numbers are activated a last place apart and then rounded apart: hence not to the last bit."""
    built, values, bias = library(flags), torch.randn(35, width), torch.randn(35)
    matrix, x = hold(values), torch.randn(20, width) * 3
    found = compiled_product(built, matrix, x, bias, gelu=True)
    assert error(found, quick_gelu(x.clone()), values, bias) < 1e-4
    assert torch.equal(found[:3], compiled_product(built, matrix, x[:3], bias, gelu=True))


@BUILDS
def test_x_may_be_a_view_and_may_be_empty(flags: tuple[str, ...]) -> None:
    built, wide, matrix = library(flags), torch.randn(5, 200), hold(torch.randn(33, 96))
    for view in (wide[:, 50:146], torch.randn(96, 5).T):
        expected = compiled_product(built, matrix, view.contiguous(), None)
        assert torch.equal(compiled_product(built, matrix, view, None), expected)
    assert compiled_product(built, matrix, torch.empty(0, 96), None).shape == (0, 33)


@BUILDS
def test_activations_are_rounded_to_the_nearest(flags: tuple[str, ...]) -> None:
    """Ties to even, what is not finite too, as torch rounds."""
    exact = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-9, 3.4e38, float("inf"), float("nan")])
    out = compiled_product(library(flags), hold(torch.ones(1, 1)), exact.unsqueeze(1), None)[:, 0]
    assert torch.equal(out.nan_to_num(7.0), exact.bfloat16().float().nan_to_num(7.0))


@BUILDS
@pytest.mark.parametrize("rows", [3, 20, 70])
def test_what_is_not_finite_stays_in_its_row(rows: int, flags: tuple[str, ...]) -> None:
    built, x, matrix = library(flags), torch.randn(rows, 1100), hold(torch.randn(9, 1100))
    x[0, 7], x[1, 1099] = float("nan"), float("inf")
    out = compiled_product(built, matrix, x, None)
    assert not out[:2].isfinite().any()
    assert out[2:].isfinite().all()


def test_torch_multiplies_in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "PANEL_NUMBERS", 1000)
    values, x, bias = torch.randn(33, 96), torch.randn(5, 96), torch.randn(33)
    assert error(product_with_torch(hold(values), x, bias), x, values, bias) < 2e-6


class Broken:
    """A library whose every first result is zero."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def qvl_linear_pairs(self, *arguments: Any) -> None:
        self._real.qvl_linear_pairs(*arguments)
        ctypes.memset(arguments[4], 0, 4)


def test_what_computes_wrong_numbers_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = library(EMULATED)
    monkeypatch.setattr(linear_pairs, "open_library", lambda: real)
    assert kernels.__wrapped__().library is real
    assert not computes_right(Broken(real))
    monkeypatch.setattr(linear_pairs, "open_library", lambda: Broken(real))
    with caplog.at_level(logging.WARNING, "qvl.kernels"):
        assert kernels.__wrapped__().library is None
    assert caplog.text.count("wrong numbers") == 1


def test_without_a_library_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is warned: such matrices are held in rows, and it is there that a compiler is missed."""
    monkeypatch.setenv("QVL_NATIVE_KERNELS", "0")
    chosen = kernels.__wrapped__()
    assert chosen.library is None
    assert "QVL_NATIVE_KERNELS" in chosen.reason
    monkeypatch.setattr(linear_pairs, "kernels", lambda: chosen)
    values, x, bias = torch.randn(33, 96), torch.randn(5, 96), torch.randn(33)
    matrix = PairMatrix.empty(33, 96)
    matrix.write(0, values)
    assert error(matrix.product(x, bias), x, values, bias) < 2e-6
    assert error(matrix.product(x.clone(), bias, gelu=True), quick_gelu(x), values, bias) < 2e-6
