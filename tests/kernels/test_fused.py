"""Compiled kernels between the products against float64, and against torch's operations for every other dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels import fused
from tests.kernels.compiled import skip_without_compiler


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if request.param == "torch":
        monkeypatch.setattr(fused, "kernels_for", lambda x: None)
    elif fused.cpu_kernels() is None:
        skip_without_compiler()


def close(out: Tensor, exact: Tensor) -> bool:
    return torch.allclose(out.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 17), (40, 1536), (0, 8)])
def test_norm_and_residual(rows: int, size: int) -> None:
    x, residual, weight = torch.randn(rows, size), torch.randn(rows, size), torch.randn(size)
    total = x.double() + residual.double()
    out, new = fused.add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert close(new, total)
    assert close(out, F.rms_norm(total, (size,), weight.double(), 1e-5))
    out, same = fused.add_rms_norm(x, None, weight, 1e-5)
    assert torch.equal(same, x)
    assert close(out, F.rms_norm(x.double(), (size,), weight.double(), 1e-5))


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 17), (40, 1280), (0, 8)])
def test_layer_norm_and_what_is_added_first(rows: int, size: int) -> None:
    x, delta, weight, bias = torch.randn(rows, size) + 3, torch.randn(rows, size), torch.randn(size), torch.randn(size)
    total = x.double() + delta.double()
    exact = F.layer_norm(total, (size,), weight.double(), bias.double(), 1e-6)
    sums = x.clone()
    out = fused.add_layer_norm(sums, delta, weight, bias, 1e-6)
    assert close(sums, total)
    assert torch.allclose(out.double(), exact, rtol=1e-5, atol=1e-5)
    into = torch.empty(rows, size)
    assert fused.add_layer_norm(total.float(), None, weight, bias, 1e-6, into).data_ptr() == into.data_ptr()
    assert torch.allclose(into.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 19), (5, 8960), (70, 300)])
def test_gated_activation(rows: int, size: int) -> None:
    gate_up = torch.randn(rows, 2 * size) * 20
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert close(fused.silu_and_mul(gate_up), F.silu(gate) * up)


def test_activations_at_the_ends_of_the_range() -> None:
    ends = torch.tensor([-1e30, -200.0, -90.0, -87.0, -0.0, 0.0, 87.0, 90.0, 1e30, float("inf"), float("nan"), -88.5])
    wide = ends.repeat_interleave(8)
    out = fused.silu_and_mul(torch.cat((wide, torch.ones_like(wide)))[None])[0]
    assert torch.allclose(out.double(), F.silu(wide.double()), rtol=2e-6, atol=1e-30, equal_nan=True)
    exact = wide.double() * torch.sigmoid(1.702 * wide.double())
    assert torch.allclose(fused.quick_gelu(wide.clone()).double(), exact, rtol=2e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("size", [1, 13, 20_003])
def test_quick_gelu(size: int) -> None:
    x = torch.randn(size) * 10
    assert close(fused.quick_gelu(x.clone()), x.double() * torch.sigmoid(1.702 * x.double()))


@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 2), (5, 3, 16), (40, 12, 128), (7, 4, 20)])
def test_rotation_of_a_view(rows: int, heads: int, dim: int) -> None:
    wide = torch.randn(rows, (heads + 2) * dim)
    x = wide[:, dim : (heads + 1) * dim].unflatten(1, (heads, dim))
    angles = torch.randn(rows, 1, dim // 2).repeat(1, 1, 2) * 10
    cos, sin = angles.cos(), angles.sin()
    a, b = x.double().chunk(2, dim=-1)
    c, s = cos.double()[..., : dim // 2], sin.double()[..., : dim // 2]
    assert close(fused.rotate(x, cos, sin), torch.cat((a * c - b * s, b * c + a * s), dim=-1))


def test_other_dtypes_take_torchs_operations() -> None:
    x = torch.randn(4, 32).bfloat16()
    assert fused.silu_and_mul(x).dtype == torch.bfloat16
    assert fused.add_rms_norm(x, x, torch.ones(32).bfloat16(), 1e-6)[0].dtype == torch.bfloat16
    assert fused.rotate(x.view(4, 2, 16), torch.ones(4, 1, 16), torch.zeros(4, 1, 16)).dtype == torch.bfloat16
