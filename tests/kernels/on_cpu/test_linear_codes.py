"""Codes of 8 and 4 bits: the compiled kernels against the same arithmetic in torch, and both against the numbers."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl.kernels.native import NativeUnavailable
from qvl.kernels.on_cpu import linear_codes, matrices
from qvl.kernels.on_cpu.linear_codes import (
    PORTABLE,
    QuantisedMatrix,
    compiled_product,
    computes_right,
    kernels,
    open_library,
    rounded,
    write_with_torch,
)
from qvl.kernels.on_cpu.matrices import WITHOUT_AMX, product_by_panels
from tests.kernels.compiled import skip_without_compiler

SHAPES = ((1, 1), (3, 15), (70, 67), (37, 1000), (130, 64), (8, 4111))
# The processor's own instructions, and the same logic in C: 512-bit vectors as AVX-512 VNNI has them, and narrower.
BUILDS = ((), ("-DQVL_PORTABLE=64", "-O1"), ("-DQVL_PORTABLE=32", "-O1"), (*PORTABLE, "-O1"))
VNNI_ALONE = (*BUILDS[1], *WITHOUT_AMX)


def library(flags: tuple[str, ...] = ()) -> Any:
    try:
        return open_library(flags)
    except NativeUnavailable as error:
        skip_without_compiler(error)


def quantise(bits: int, values: Tensor) -> QuantisedMatrix:
    matrix = QuantisedMatrix.empty(bits, *values.shape)
    matrix.write(0, values)
    return matrix


def everything(matrix: QuantisedMatrix) -> Tensor:
    return matrix.read(torch.arange(matrix.rows))


def relative(out: Tensor, exact: Tensor) -> float:
    return ((out - exact).norm() / exact.norm()).item()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("flags", BUILDS, ids=["native", "portable-64", "portable-32", "portable-16"])
@pytest.mark.parametrize("bits", [8, 4])
def test_products_are_those_of_the_codes(bits: int, flags: tuple[str, ...]) -> None:
    """What is left after both sides are rounded is fp32 rounding alone."""
    built = library(flags)
    for out, width in SHAPES:
        matrix, bias = quantise(bits, torch.randn(out, width)), torch.randn(out)
        for rows in (1, 2, 3, 4, 5, 8, 13, 27) if width < 2000 else (7, 33):
            x = torch.randn(rows, width) * 10
            exact = rounded(x).double() @ everything(matrix).double().T + bias
            bound = rounded(x).double().abs() @ everything(matrix).double().abs().T + bias.abs()
            found = compiled_product(built, matrix, x, bias)
            assert ((found - exact).abs() / bound).max().item() < 2e-6, (out, width, rows)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [3, 30])
def test_the_largest_codes_do_not_overflow(bits: int, rows: int) -> None:
    """AVX2 adds pairs of products in 16 bits: all at their largest, of one sign, is the worst."""
    values = torch.full((5, 700), -1.0)
    matrix = quantise(bits, values)
    for sign in (1.0, -1.0):
        expected = torch.full((rows, 5), -700 * sign)
        assert matrix.product(torch.full((rows, 700), sign), None) == pytest.approx(expected, 2e-3)


@pytest.mark.parametrize("kind", ["normal", "uniform", "signs", "one large", "groups of four"])
def test_one_row_and_many_find_the_same_sums(kind: str) -> None:
    """A single row of x meets several tiles at a time, and a tile several rows: whole numbers have the same sums."""
    made = {
        "normal": torch.randn,
        "uniform": lambda *shape: torch.rand(*shape) * 2 - 1,
        "signs": lambda *shape: torch.randn(*shape).sign(),
        "one large": lambda *shape: torch.randn(*shape) * torch.where(torch.arange(shape[1]) % 500 == 7, 100.0, 1.0),
        "groups of four": lambda *shape: torch.where(torch.arange(shape[1]) % 32 < 2, 1.0, 0.01).expand(*shape),
    }[kind]
    matrix, x = quantise(8, made(43, 1300)), made(40, 1300) * -1
    together = matrix.product(x, None)
    apart = torch.cat([matrix.product(part, None) for part in x.split([1, 1, 2, 5, 31])])
    assert torch.equal(together, apart)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("flags", [*BUILDS[:2], VNNI_ALONE], ids=["native", "portable-64", "without AMX"])
def test_a_row_does_not_depend_on_its_company(bits: int, flags: tuple[str, ...]) -> None:
    built, matrix = library(flags), quantise(bits, torch.randn(45, 2600))
    x, bias = torch.randn(293, 2600), torch.randn(45)  # several parts of k, and of rows, with AMX and AVX-512
    together = compiled_product(built, matrix, x, bias)
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 24, 31, 257):
        assert torch.equal(compiled_product(built, matrix, x[:rows], bias), together[:rows])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(999, 2500), (1999, 100)], ids=["wide", "narrow"])
def test_threads_share_the_work(threads: int, shape: tuple[int, int]) -> None:
    matrix, x = quantise(8, torch.randn(shape)), torch.randn(70, shape[1])
    expected = matrix.product(x, None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(quantise(8, everything(matrix)).codes, matrix.codes)
        assert torch.equal(matrix.product(x, None), expected)
        assert torch.equal(torch.cat([matrix.product(part, None) for part in x.split(2)]), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [8, 4])
def test_x_may_be_a_view_and_may_be_empty(bits: int) -> None:
    wide, matrix = torch.randn(5, 200), quantise(bits, torch.randn(33, 96))
    view = wide[:, 50:146]
    assert torch.equal(matrix.product(view, None), matrix.product(view.contiguous(), None))
    turned = torch.randn(96, 5).T
    assert torch.equal(matrix.product(turned, None), matrix.product(turned.contiguous(), None))
    assert matrix.product(torch.empty(0, 96), None).shape == (0, 33)


@pytest.mark.parametrize("flags", BUILDS, ids=["native", "portable-64", "portable-32", "portable-16"])
@pytest.mark.parametrize("width", [77, 1100])
def test_x_may_pass_an_activation_on_its_way_in(width: int, flags: tuple[str, ...]) -> None:
    """A number that just reaches the next code is rounded up here and down there: hence not to the last bit."""
    matrix, x, bias = quantise(8, torch.randn(35, width)), torch.randn(20, width) * 3, torch.randn(35)
    activated = x * torch.sigmoid(1.702 * x)
    found = compiled_product(library(flags), matrix, x, bias, gelu=True)
    assert relative(found, rounded(activated) @ everything(matrix).T + bias) < 2e-3
    assert relative(product_by_panels(matrix, activated, bias), found) < 2e-2
    assert torch.equal(found[:3], compiled_product(library(flags), matrix, x[:3], bias, gelu=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_is_seen(bits: int) -> None:
    """A row of x that overflowed must not come out as an ordinary number; its neighbours must."""
    x = torch.randn(3, 1100)
    x[0, 7], x[1, 1099] = float("nan"), float("inf")
    out = quantise(bits, torch.randn(9, 1100)).product(x, None)
    assert not out[:2].isfinite().any()
    assert out[2].isfinite().all()
    assert quantise(bits, torch.randn(9, 64)).product(torch.zeros(1, 64), torch.ones(9)).tolist() == [[1.0] * 9]


@pytest.mark.parametrize("bits", [8, 4])
def test_compiled_and_torch_write_the_same_codes(bits: int) -> None:
    """But for numbers that lie between two codes."""
    library()
    values = torch.randn(37, 1000) * torch.logspace(-6, 3, 37)[:, None]
    ours, theirs = quantise(bits, values), QuantisedMatrix.empty(bits, 37, 1000)
    write_with_torch(theirs, 0, values)
    assert torch.equal(ours.scales, theirs.scales)
    assert (everything(ours) != everything(theirs)).float().mean().item() < 1e-3
    x = torch.randn(5, 1000)
    assert relative(product_by_panels(theirs, x, None), x @ everything(theirs).T) < 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_may_come_in_any_portions(bits: int) -> None:
    values = torch.randn(23, 300).bfloat16()
    matrix = QuantisedMatrix.empty(bits, 23, 300)
    for first, stop in ((17, 23), (0, 3), (3, 4), (4, 17)):
        matrix.write(first, values[first:stop])
    whole = quantise(bits, values)
    assert torch.equal(matrix.codes, whole.codes)
    assert torch.equal(matrix.scales, whole.scales)
    ids = torch.tensor([22, 0, 5, 5])
    assert torch.equal(matrix.read(ids), everything(matrix)[ids])


def test_eight_bits_are_within_half_a_code() -> None:
    values = torch.randn(20, 300)
    codes = values.abs().amax(-1, keepdim=True) / 127
    assert ((everything(quantise(8, values)) - values).abs() <= 0.5001 * codes).all()


def plain_four_bits(values: Tensor) -> Tensor:
    """The usual rounding: 16 even steps from the smallest to the largest of 128 numbers."""
    groups = values.unflatten(-1, (-1, 128))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    return (((groups - low) / step).round() * step + low).flatten(-2)


@pytest.mark.parametrize(("kind", "bound"), [("normal", 1.02), ("heavy", 1.02), ("one-sided", 1.25)])
def test_four_bits_are_about_as_good_as_the_usual_rounding(kind: str, bound: float) -> None:
    """Codes without a zero point lose where numbers are large on one side only, which weights are not."""
    values = torch.randn(64, 1024)
    if kind == "heavy":
        values = values * values.abs()
    if kind == "one-sided":
        values = torch.where(values > 2, values * 2, values)
    assert relative(everything(quantise(4, values)), values) < bound * relative(plain_four_bits(values), values)


def test_one_large_number_spoils_only_its_span() -> None:
    """Models of this family have single activations a thousand times the rest."""
    x, values = torch.randn(1, 2048), torch.randn(64, 2048)
    x[0, 100] = 3000
    out = quantise(8, values).product(x, None) - x[:, 100, None] * values[:, 100]
    x[0, 100] = 0
    whole = (x / 3000 * 127).round() * 3000 / 127
    exact = x[:, 512:] @ values[:, 512:].T
    assert relative(quantise(8, values[:, 512:]).product(x[:, 512:], None), exact) < 0.02
    assert whole.count_nonzero() == 0  # with one scale for all, nothing else would be left
    assert out.isfinite().all()


class Broken:
    """A library whose every first result is zero."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def qvl_quantised_linear(self, *arguments: Any) -> None:
        self._real.qvl_quantised_linear(*arguments)
        ctypes.memset(arguments[8], 0, 4)


def test_instructions_that_compute_wrong_numbers_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = library()
    assert computes_right(real)
    assert not computes_right(Broken(real))
    monkeypatch.setattr(linear_codes, "open_library", lambda flags=(): open_library(flags) if flags else Broken(real))
    with caplog.at_level(logging.WARNING, "qvl.kernels"):
        chosen = kernels.__wrapped__()
    assert "portable" in chosen.reason
    assert chosen.library.qvl_quantised_path() == b"portable"
    assert "compute wrong numbers" in caplog.text
    monkeypatch.setattr(linear_codes, "open_library", lambda flags=(): Broken(real))
    assert kernels.__wrapped__().library is None


@pytest.mark.parametrize("bits", [8, 4])
def test_without_a_compiler_torch_does_it_and_says_so(
    bits: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QVL_NATIVE_KERNELS", "0")
    with caplog.at_level(logging.WARNING, "qvl.kernels"):
        chosen = kernels.__wrapped__()
    assert chosen.library is None
    assert caplog.text.count("slower") == 1
    monkeypatch.setattr(linear_codes, "kernels", lambda: chosen)
    monkeypatch.setattr(matrices, "PANEL_NUMBERS", 1000)
    values, x, bias = torch.randn(33, 96), torch.randn(5, 96), torch.randn(33)
    matrix = quantise(bits, values)
    assert relative(matrix.product(x, bias), x @ values.T + bias) < (0.01 if bits == 8 else 0.15)
