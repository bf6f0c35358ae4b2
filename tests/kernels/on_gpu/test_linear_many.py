"""Products with SiLU inside: which are computed so, that the kernel builds and fits, and its numbers on a GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels import linear
from qvl.kernels.gpu import HOPPER, shared_memory
from tests.kernels.failing import PROBLEMS, warning_of
from tests.kernels.gluon_source import compiled_for_hopper

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER,
    reason="no GPU of that compute capability",
)


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def written_out(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def with_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = F.linear(x, weight, bias)
    return out * torch.sigmoid(1.702 * out)


# --- which products ---------------------------------------------------------------------------------------------------


class Written:
    """`qvl.kernels.linear.ManyRows` in torch."""

    silu_product = staticmethod(written_out)

    @staticmethod
    def quick_gelu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return with_quick_gelu(x, weight, bias)


def test_a_cpu_has_no_kernel_for_many_rows() -> None:
    assert linear.many_rows(CPU, torch.float32) is None
    assert linear.gated_many(torch.zeros(linear.MANY, 16), torch.zeros(32, 16)) is None


def test_many_rows_of_matrices_that_can_be_fetched_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "many_rows", lambda *_: Written)
    x, weight = torch.randn(linear.MANY, 16), torch.randn(64, 16)
    out = linear.gated_many(x, weight)
    assert out is not None
    assert torch.equal(out, written_out(x, weight))
    assert linear.gated_many(x[1:], weight) is None
    assert linear.gated_many(x, weight[:48]) is None  # gate and up of 24 rows each: 16 bytes are no whole part of them
    assert linear.gated_many(x[:, :8], weight[:, :8]) is None


@pytest.mark.parametrize("rows", [linear.MANY_PATCHES - 1, linear.MANY_PATCHES])
@pytest.mark.parametrize("size", [32, 40])
def test_quick_gelu_is_the_same_whoever_computes_it(monkeypatch: pytest.MonkeyPatch, rows: int, size: int) -> None:
    asked: list[int] = []

    class Kernel(Written):
        @staticmethod
        def quick_gelu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            asked.append(len(x))
            return with_quick_gelu(x, weight, bias)

    monkeypatch.setattr(linear, "many_rows", lambda *_: Kernel)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 16), torch.randn(size, 16), torch.randn(size)
    exact = with_quick_gelu(x, weight, bias)
    assert relative_error(linear.quick_gelu_linear(x, weight, bias), exact) < 1e-5
    assert asked == [rows] * (rows >= linear.MANY_PATCHES and size == 32)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_kernel_that_fails_its_trial_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, problem: str
) -> None:
    choose = linear.many_rows
    said = warning_of(problem, "qvl.kernels.on_gpu.linear_many", linear, choose, monkeypatch, caplog)
    assert linear.APART in said


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [1, 2, 3, 8, 11, 12, 16, 17, 23, 36])
@pytest.mark.parametrize(("columns", "programs"), [(1, 132), (20, 132), (148, 132), (70, 114)])
def test_every_tile_is_dealt_once_and_nobody_waits_long(height: int, columns: int, programs: int) -> None:
    products = pytest.importorskip("qvl.kernels.on_gpu.linear_many", reason="Triton is not installed")
    dealt = products.deal(height, columns, programs)
    assert dealt.dtype == np.int32 and dealt.shape[1] == programs
    seen = []
    ends = []
    for hand in dealt.T.tolist():
        tiles = [told for told in hand if told != products.NO_TILE]
        assert tiles == hand[: len(tiles)]  # nothing behind the first that is none
        ends.append(0.0)
        for told in tiles:
            at, rows = divmod(told, 2)
            row, column = divmod(at, products.MOST_COLUMNS.value)
            seen += [(row + i, column) for i in range(rows + 1)]
            ends[-1] += 1.0 if rows else products.ALONE
    assert sorted(seen) == [(row, column) for row in range(height) for column in range(columns)]
    assert max(ends) <= height * columns / (2 * programs) + 1.2


def test_few_tiles_of_a_last_turn_are_shared() -> None:
    products = pytest.importorskip("qvl.kernels.on_gpu.linear_many", reason="Triton is not installed")
    assert (products.deal(2, 15, 10) >= 0).sum(axis=0).tolist() == [2] * 10  # five tiles are left for ten programs
    assert (products.deal(2, 18, 10) >= 0).sum(axis=0).tolist() == [2] * 8 + [1] * 2  # sharing would not end sooner


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ["SILU", "QUICK_GELU"])
def test_it_fits_and_keeps_its_sums_in_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    products = pytest.importorskip("qvl.kernels.on_gpu.linear_many", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compiled_products(torch.bfloat16, "bf16", getattr(products, name))
    assert kernel.metadata.shared <= shared_memory(HOPPER)
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n256k16" in ptx
    assert "cp.async.bulk.tensor.3d" in ptx  # gate and up at once
    assert re.search(r"cp.async.bulk.tensor.2d.global", ptx)
    assert "setmaxnreg" in ptx
    assert "tanh.approx.f32" in ptx
    assert re.search(r"\bSTL\b", kernel.asm["sass"]) is None


def compiled_products(dtype: torch.dtype, name: str, activation: int) -> Any:
    """As `product` launches it."""
    from qvl.kernels.on_gpu import linear_many as products
    from qvl.kernels.on_gpu.boxes import layout_of

    halves = 2 if activation == products.SILU else 1
    columns = products.COLUMNS // halves
    boxes = {
        "x_box": (products.ROWS, products.DEPTH),
        "w_box": (halves, columns, products.DEPTH),
        "out_box": (products.ROWS, columns),
    }
    types: dict[str, str] = {
        argument: f"tensordesc<{name}{list(box)},{layout_of(box, dtype)!r}>" for argument, box in boxes.items()
    }
    types |= {"dealt_ptr": "*i32", "bias_ptr": f"*{name}"} | dict.fromkeys(("turns", "size", "depth"), "i32")
    constants = {"ACTIVATION": activation, "STAGES": products.STAGES}
    aligned = ("dealt_ptr", "bias_ptr", "size", "depth")
    return compiled_for_hopper(products._product, types, constants, aligned, products.REGISTERS)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "depth", "size"),
    [
        (1, 64, 128),
        (64, 80, 16),
        (65, 3584, 144),
        (128, 16, 1024),
        (193, 208, 18_944),
        (654, 64, 18_944),
        (1422, 1536, 8960),
    ],
)
def test_as_exact_as_two_steps(rows: int, depth: int, size: int, dtype: torch.dtype) -> None:
    """Parts of tiles in every direction, programs with no tile, with one and with many."""
    from qvl.kernels.on_gpu.linear_many import silu_product

    x, weight = numbers(rows, depth, dtype=dtype), numbers(2 * size, depth, dtype=dtype, scale=depth**-0.5)
    exact = written_out(x.double(), weight.double())
    out = silu_product(x, weight)
    assert relative_error(out, exact) <= relative_error(written_out(x, weight), exact)
    assert torch.equal(out, silu_product(x, weight))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("rows", "depth", "size"), [(1, 64, 256), (200, 80, 272), (5476, 1280, 5120)])
def test_quick_gelu_as_exact_as_two_steps(rows: int, depth: int, size: int) -> None:
    from qvl.kernels.on_gpu.linear_many import quick_gelu_product

    x, weight, bias = numbers(rows, depth), numbers(size, depth, scale=depth**-0.5), numbers(size)
    exact = with_quick_gelu(x.double(), weight.double(), bias.double())
    out = quick_gelu_product(x, weight, bias)
    assert relative_error(out, exact) <= relative_error(with_quick_gelu(x, weight, bias), exact)
    assert torch.equal(out, quick_gelu_product(x, weight, bias))


@pytest.mark.gpu
@on_gpu
def test_a_sigmoid_near_zero_is_as_exact_as_in_two_steps() -> None:
    """What is left there is the difference of two numbers that are nearly the same."""
    from qvl.kernels.on_gpu.linear_many import quick_gelu_product, silu_product

    x, weight, bias = numbers(256, 64), numbers(512, 64, scale=1 / 4), numbers(512)
    exact = F.linear(x.double(), weight.double(), bias.double())
    below = exact < -3
    assert below.sum() > 1000
    error = quick_gelu_product(x, weight, bias).double() - exact * torch.sigmoid(1.702 * exact)
    of_two = with_quick_gelu(x, weight, bias).double() - exact * torch.sigmoid(1.702 * exact)
    assert error[below].abs().mean() <= of_two[below].abs().mean()
    exact = written_out(x.double(), weight.double())
    below = F.linear(x.double(), weight[:256].double()) < -3
    assert below.sum() > 1000
    error, of_two = silu_product(x, weight).double() - exact, written_out(x, weight).double() - exact
    assert error[below].abs().mean() <= of_two[below].abs().mean()


@pytest.mark.gpu
@on_gpu
def test_large_numbers_stay_numbers_and_rows_do_not_see_each_other() -> None:
    from qvl.kernels.on_gpu.linear_many import silu_product

    x, weight = numbers(200, 64, scale=100.0), numbers(256, 64)
    exact = written_out(x.double(), weight.double())
    assert relative_error(silu_product(x, weight), exact) < 1e-2
    spoilt = x.clone()
    spoilt[70] = float("nan")
    out = silu_product(spoilt, weight)
    assert out[70].isnan().all()
    assert torch.equal(out[:70], silu_product(x, weight)[:70])
    assert torch.equal(out[71:], silu_product(x, weight)[71:])


@pytest.mark.gpu
@on_gpu
def test_the_kernel_is_taken_on_a_gpu() -> None:
    assert linear.many_rows(CUDA, torch.bfloat16) is not None
    x, weight = numbers(linear.MANY, 256), numbers(1024, 256, scale=1 / 16)
    out = linear.gated_many(x, weight)
    assert out is not None
    assert relative_error(out, written_out(x.double(), weight.double())) < 1e-2
