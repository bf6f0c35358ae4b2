"""fp8 on a CPU, with the product written out: what is rounded, how well, and what is said where nothing multiplies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl.errors import ConfigError
from qvl.kernels import fp8
from qvl.kernels.fp8 import Fp8Matrix, round_rows
from qvl.kernels.sums import finished
from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration
from qvl.models.registry import build_model
from qvl.models.weights import load_weights
from qvl.specs import load_spec
from tests.models import oracle
from tests.models.test_one_row import WrittenOut

CPU = torch.device("cpu")


def scaled_mm(
    a: Tensor,
    b: Tensor,
    *,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """`torch._scaled_mm` with a scale per row and column or with one for each matrix, and its conditions."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert a.is_contiguous() and b.T.is_contiguous()
    assert not (a.shape[1] % 16 or b.shape[1] % 16)
    assert (scale_a.shape, scale_b.shape) in (((a.shape[0], 1), (1, b.shape[1])), ((), ()))
    assert scale_a.is_contiguous() and scale_b.is_contiguous() and use_fast_accum
    out = (a.float() * scale_a) @ (b.float() * scale_b)
    return (out if bias is None else out + bias).to(out_dtype)


@pytest.fixture
def multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    torch.manual_seed(0)


def relative(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def test_every_row_has_its_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    x[1] *= 1e6
    x[2] = 0
    rounded = round_rows(x)
    assert rounded.codes.float().abs().amax(-1).tolist() == [448, 448, 0, 448]
    assert ((rounded.codes.float() * rounded.scales - x).abs() <= x.abs() / 16 + rounded.scales / 1024).all()


@pytest.mark.usefixtures("multiplies")
def test_products_are_as_close_as_eight_bits_are() -> None:
    values, x, bias = torch.randn(48, 160), torch.randn(7, 160), torch.randn(48)
    matrix = Fp8Matrix.empty(48, 160, CPU)
    matrix.write(0, values[:10])
    matrix.write(10, values[10:].bfloat16())
    assert relative(matrix.read(torch.arange(48)), values) < 0.04
    exact = x @ values.T + bias
    assert relative(matrix.product(x, bias), exact) < 0.06
    assert torch.equal(matrix.product(round_rows(x), bias), matrix.product(x, bias))
    assert relative(finished(matrix.sums(x, bias)), matrix.product(x, bias)) < 1e-6
    assert fp8.fp8_problem(CPU) is None
    assert "a scale per row" in fp8.require_fp8(CPU)


@pytest.mark.usefixtures("multiplies")
def test_products_of_codes_fit_into_sixteen_bits() -> None:
    """All codes the largest, over the widest matrix of the family: far beyond fp16 without the factor."""
    matrix = Fp8Matrix.empty(16, 29696, CPU)
    matrix.write(0, torch.ones(16, 29696))
    sums = matrix.sums(torch.ones(2, 29696, dtype=torch.float16), None)
    assert sums.parts.dtype == torch.float16
    assert torch.equal(finished(sums), torch.full((2, 16), 29696.0, dtype=torch.float16))


def test_sides_that_the_product_cannot_take_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"multiples of 16, this model has one of 48 x 100"):
        Fp8Matrix.empty(48, 100, CPU)


@pytest.mark.parametrize("problem", ["raises", "wrong"])
def test_where_nothing_multiplies_it_says_so(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    def broken(a: Tensor, b: Tensor, **given: Any) -> Tensor:
        if problem == "raises":
            raise RuntimeError("no kernel image is available")
        return torch.zeros(a.shape[0], b.shape[1])

    monkeypatch.setattr(torch, "_scaled_mm", broken)
    says = r"a small product did not run \(RuntimeError: no kernel" if problem == "raises" else "its products are wrong"
    with pytest.raises(ConfigError, match=f"'quantization' fp8 does not run here: {says}"):
        fp8.require_fp8(CPU)


@pytest.mark.usefixtures("multiplies")
@pytest.mark.parametrize("name", ["text", "pictures"])
def test_a_network_in_fp8(checkpoints: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Close to the plain one, in steps of many rows and of one; tower, embedding and head as they were."""
    folder = checkpoints[0]
    reference, plain = oracle.load_reference(folder), oracle.load_ours(folder)
    ours = build_model(load_spec(folder), torch.float32, "cpu", "fp8")
    load_weights(ours, folder)
    held = {path for path, module in ours.named_modules() if getattr(module, "matrix", None) is not None}
    assert held
    assert all(path.startswith("model.layers.") for path in held)
    case = oracle.make_case(reference.config, name)
    positions = oracle.reference_positions(reference, case)
    exact = oracle.our_logits(plain, case, positions, reference.config)
    many = oracle.our_logits(ours, case, positions, reference.config)
    assert 0.01 < relative(many, exact) < 0.25
    monkeypatch.setattr(
        Qwen2VLForConditionalGeneration, "one_row_kernels", lambda self, x: WrittenOut() if len(x) == 1 else None
    )
    one = oracle.our_logits(ours, case, positions, reference.config, 1)
    assert 0.01 < relative(one, exact) < relative(many, exact)  # activations are not rounded there
