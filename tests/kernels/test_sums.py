"""Products that their readers finish: what they stand for, and that every reader makes the same of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels import fused
from qvl.kernels.sums import Sums, finished
from tests.kernels.interpreted import DEVICE, INTERPRETED, ON_GPU, here, run_in_the_interpreter

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests of this file run here")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def some(rows: int, width: int, dtype: torch.dtype, parts: int, scaled: bool, bias: bool) -> Sums:
    held = torch.float32 if parts > 1 else dtype
    return Sums(
        torch.randn(parts, rows, width).to(DEVICE, held),
        dtype,
        0.25,
        torch.rand(rows, 1).to(DEVICE) if scaled else None,
        torch.rand(width).to(DEVICE) if scaled else None,
        torch.randn(width).to(DEVICE, dtype) if bias else None,
    )


def written_out(x: Sums) -> Tensor:
    """In fp64, one number after the other."""
    out = torch.zeros(x.parts.shape[1:], dtype=torch.float64)
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            value = float(sum(float(part[row, column]) for part in x.parts))
            if x.row_scales is not None and x.column_scales is not None:
                value *= float(x.row_scales[row, 0]) * x.factor * float(x.column_scales[column])
            out[row, column] = value + (0.0 if x.bias is None else float(x.bias[column]))
    return out.to(DEVICE)


def close(out: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    return bool((out.double() - exact).norm() <= ROUNDING[dtype] * exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_what_they_stand_for(dtype: torch.dtype, scaled: bool) -> None:
    x = some(3, 20, dtype, parts=1 if scaled else 4, scaled=scaled, bias=True)
    assert len(x) == 3
    out = finished(x)
    assert out.dtype == dtype
    assert close(out, written_out(x), dtype)
    assert finished(out) is out


def test_what_is_finished_is_not_copied() -> None:
    x = some(3, 20, torch.bfloat16, parts=1, scaled=False, bias=False)
    assert finished(x).data_ptr() == x.parts.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "scaled"), [(1, False), (5, False), (1, True)])
def test_norms_finish_them(dtype: torch.dtype, parts: int, scaled: bool) -> None:
    x, residual = some(4, 96, dtype, parts, scaled, False), torch.randn(4, 96).to(DEVICE, dtype)
    weight = torch.rand(96).to(DEVICE, dtype)
    total = written_out(x) + residual.double()
    out, new = fused.add_rms_norm(x, residual.clone(), weight, 1e-6)
    assert isinstance(out, Tensor)
    assert close(new, total, dtype)
    assert close(out, F.rms_norm(total, (96,), weight.double(), 1e-6), dtype)


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "scaled"), [(1, False), (5, False), (1, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_rotations_finish_them(dtype: torch.dtype, parts: int, scaled: bool, bias: bool) -> None:
    from qvl.kernels.on_gpu import ops

    heads, kv_heads, dim, rows = 3, 2, 16, 3
    x = some(rows, (heads + 2 * kv_heads) * dim, dtype, parts, scaled, bias)
    half = torch.rand(rows, 1, dim // 2).repeat(1, 1, 2).to(DEVICE) * 6
    kv = tuple(torch.zeros(8, 1, kv_heads, dim, dtype=dtype, device=DEVICE) for _ in range(2))
    slots = torch.tensor([5, -1, 2], device=DEVICE)
    q = ops.rope_and_store(x, half.cos(), half.sin(), slots, (kv[0], kv[1]), False)
    wide = written_out(x).float()
    exact_q, exact_k, exact_v = fused.split_and_rotate(wide, (half.cos(), half.sin()), (kv_heads, dim))
    assert close(q, exact_q.double(), dtype)
    for cache, exact in ((kv[0], exact_k), (kv[1], exact_v)):
        assert close(cache[[5, 2], 0], exact[[0, 2]].double(), dtype)
        assert not cache[[0, 1, 3, 4, 6, 7]].any()
