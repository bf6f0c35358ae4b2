"""Every way of multiplying on a CPU against float64."""

from __future__ import annotations

import logging
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qvl.kernels import native
from qvl.kernels.native import NativeUnavailable
from qvl.kernels.on_cpu import linear_floats
from qvl.kernels.on_cpu.linear_floats import (
    CpuLinear,
    Product,
    choose_cpu_linear,
    native_product,
    panels,
    rounded_or_panels,
)
from tests.kernels.compiled import skip_without_compiler

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def compiled(dtype: torch.dtype) -> Product:
    try:
        return native_product(dtype)
    except NativeUnavailable as error:
        skip_without_compiler(error)


def check_compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The sums are as exact as with fp32 weights."""
    check(compiled(weight.dtype), x, weight, bias)


def check(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, tolerance: float = 2e-6) -> None:
    exact = x.double() @ weight.double().T
    scale = (x.double().abs() @ weight.double().abs().T).clamp_min(1e-30)  # the bound of rounding errors
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    out = product(x, weight, bias)
    assert out.dtype == torch.float32
    assert ((out - exact).abs() / scale).max().item() < tolerance


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 23, 24, 27, 31, 33])
@pytest.mark.parametrize(("out", "width"), [(1, 1), (3, 15), (70, 67), (37, 1000), (130, 64), (8, 4111)])
def test_the_compiled_kernel_is_exact(dtype: torch.dtype, rows: int, out: int, width: int) -> None:
    x, weight, bias = torch.randn(rows, width), torch.randn(out, width).to(dtype), torch.randn(out)
    check_compiled(x, weight, bias)
    check_compiled(x, weight, None)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names instructions of x86-64")
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_vectors_are_exact_too(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor without AVX2 computes, in another order of its own."""
    plain = native.load_native(linear_floats.SOURCE, ("-march=x86-64", "-O1"))
    monkeypatch.setattr(linear_floats, "load_native", lambda _: plain)
    product = native_product.__wrapped__(dtype)
    x, weight, bias = torch.randn(37, 2100), torch.randn(53, 2100).to(dtype), torch.randn(53)
    check(product, x, weight, bias)
    together = product(x, weight, bias)
    for rows in (1, 2, 3, 5, 8, 32):
        assert torch.equal(product(x[:rows], weight, bias), together[:rows])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_compiled(torch.randn(70, 2500), torch.randn(999, 2500).bfloat16(), torch.randn(999))
    finally:
        torch.set_num_threads(before)


def test_rows_may_be_a_view_of_a_wider_tensor() -> None:
    wide = torch.randn(5, 200)
    weight = torch.randn(33, 96).bfloat16()
    check_compiled(wide[:, 50:146], weight, None)
    check_compiled(torch.randn(96, 5).T, weight, None)


def test_no_rows_give_no_rows() -> None:
    assert compiled(torch.bfloat16)(torch.empty(0, 8), torch.ones(4, 8).bfloat16(), None).shape == (0, 4)


def test_not_a_number_stays_one() -> None:
    x = torch.tensor([[1.0, float("nan")], [1.0, float("inf")]])
    out = compiled(torch.bfloat16)(x, torch.ones(1, 2).bfloat16(), None)
    assert out[0].isnan().all()
    assert out[1].isinf().all()


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_torch_alone_is_right_too(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int) -> None:
    monkeypatch.setattr(linear_floats, "PANEL_BYTES", 4 * 96 * 10)
    x, weight, bias = torch.randn(rows, 96), torch.randn(33, 96).to(dtype), torch.randn(33)
    check(panels, x, weight, bias)
    check(rounded_or_panels, x, weight, bias, tolerance=2 ** -6 if rows == 1 else 2e-6)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_choice_has_a_reason_and_is_right(dtype: torch.dtype) -> None:
    chosen = choose_cpu_linear(dtype)
    assert chosen.reason
    for rows in (1, 30):
        check(chosen, torch.randn(rows, 64), torch.randn(16, 64).to(dtype), None, tolerance=2**-6)


@pytest.mark.parametrize("one", [0.9, 2.0])
def test_a_measured_choice_takes_the_faster_one(monkeypatch: pytest.MonkeyPatch, one: float) -> None:
    """One row stays where all layers are one call unless torch is clearly faster, many unless it is beyond doubt."""
    whole = linear_floats.whole
    times = {
        (panels, 1): 1.0,
        (panels, 64): 9.0,
        (panels, 256): 30.0,
        (whole, 1): one,
        (whole, 64): 8.0,
        (whole, 256): 31.0,
    }
    monkeypatch.setattr(linear_floats, "seconds", lambda product, _, rows: times[product, rows])
    chosen = linear_floats.measured(panels, torch.bfloat16)
    assert chosen == CpuLinear(panels, whole, panels, chosen.reason)
    assert "1 rows: compiled kernel" in chosen.reason
    assert "64 rows: torch" in chosen.reason
    assert "256 rows: compiled kernel" in chosen.reason
    times |= {(whole, 64): 8.9, (whole, 256): 26.0}
    chosen = linear_floats.measured(panels, torch.bfloat16)
    assert chosen == CpuLinear(panels, panels, whole, chosen.reason)


def test_each_number_of_rows_goes_to_its_product() -> None:
    products = [lambda x, weight, bias, name=name: name for name in ("few", "several", "many")]
    chosen = CpuLinear(*products, "")
    weight = torch.zeros(1, 4)
    rows = (1, linear_floats.FEW, linear_floats.FEW + 1, linear_floats.SEVERAL, linear_floats.SEVERAL + 1)
    assert [chosen(torch.zeros(n, 4), weight, None) for n in rows] == ["few", "few", "several", "several", "many"]


def test_torch_multiplies_one_row_where_it_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_floats, "seconds", lambda product, _, rows: 1.0 if product is panels else 0.7)
    assert linear_floats.measured(panels, torch.bfloat16).few is linear_floats.whole


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing chosen yet in this process."""
    monkeypatch.delenv(native.SWITCH, raising=False)
    for name in ("choose_cpu_linear", "native_product", "warn_once"):
        monkeypatch.setattr(
            linear_floats, name, linear_floats.functools.cache(getattr(linear_floats, name).__wrapped__)
        )
    return monkeypatch


def test_without_a_compiler_one_warning_names_reason_and_cost(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setenv("PATH", str(tmp_path))
    fresh.delenv("CC", raising=False)
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for dtype in DTYPES:
                chosen = linear_floats.choose_cpu_linear(dtype)
                assert "no C compiler" in chosen.reason
                check(chosen, torch.randn(1, 64), torch.randn(16, 64).to(dtype), torch.randn(16), tolerance=2**-6)
    assert len(caplog.records) == 1
    assert "install gcc" in caplog.text
    assert "twice as long" in caplog.text
    dtype, reason = linear_floats.preferred_cpu_dtype()
    assert reason
    assert dtype == (torch.bfloat16 if linear_floats.has_16_bit_matmul(torch.bfloat16) else torch.float32)


def test_with_the_kernel_bf16_is_preferred() -> None:
    compiled(torch.bfloat16)
    assert linear_floats.preferred_cpu_dtype()[0] == torch.bfloat16


def test_a_compiler_that_fails_is_quoted(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'code.c:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    fresh.setenv("CC", str(broken))
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NativeUnavailable, match="no such thing"):
        linear_floats.native_product(torch.bfloat16)
    assert list((tmp_path / "qvl" / "kernels").iterdir()) == []


def test_the_switch_turns_it_off(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(native.SWITCH, "0")
    with pytest.raises(NativeUnavailable, match=native.SWITCH):
        linear_floats.native_product(torch.bfloat16)


def test_the_library_is_built_once_in_a_private_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled(torch.bfloat16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load_native(linear_floats.SOURCE)
    folder = tmp_path / "qvl" / "kernels"
    (library,) = folder.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    built = library.stat().st_mtime_ns
    native.load_native(linear_floats.SOURCE)
    assert library.stat().st_mtime_ns == built
    folder.chmod(0o777)
    assert native.cache_folder() is None


def test_without_a_home_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container's user without a name: "~" is no folder, and the temporary one does not fill up."""
    compiled(torch.bfloat16)
    monkeypatch.setenv("XDG_CACHE_HOME", "~")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert native.load_native(linear_floats.SOURCE)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(NativeUnavailable, match="kept or loaded"):
        native.load_native(linear_floats.SOURCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "out", "width"), [(17, 45, 5000), (40, 16, 64), (33, 7, 37), (390, 50, 4111)])
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype, count: int, out: int, width: int) -> None:
    """Few and several rows go by two kinds of tiles, many by panels: they sum in the same order."""
    x, weight, bias = torch.randn(count, width), torch.randn(out, width).to(dtype), torch.randn(out)
    together = compiled(dtype)(x, weight, bias)
    check_compiled(x, weight, bias)
    for rows in (1, 2, 3, 4, 5, 7, 8, 16, 23, 24, 25, 29, 33):
        assert torch.equal(compiled(dtype)(x[:rows], weight, bias), together[:rows])
    for rows in (2, 6, 11):
        assert torch.equal(compiled(dtype)(x[-rows:], weight, bias), together[-rows:])


def test_many_rows_go_through_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_floats, "SLICE", 4)
    wide = torch.randn(11, 90)
    check_compiled(wide[:, :70], torch.randn(20, 70).bfloat16(), torch.randn(20))


def test_small_products_stay_on_one_core() -> None:
    """Less than it takes to call for help is not worth a call; a 2B's matrices all are worth it."""
    assert native.threads_for(1, 256, 256, usable=8) == 1
    assert native.threads_for(1, 1536, 1536, usable=8) == 8
    assert native.threads_for(64, 256, 1024, usable=8) == 8
    assert native.threads_for(64, 8960, 1536, usable=1) == 1
