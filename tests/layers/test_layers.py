"""Layers against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from qvl.kernels.fused import rotate, silu_and_mul
from qvl.layers.activation import ACTIVATIONS
from qvl.layers.norm import RMSNorm
from qvl.layers.rotary import MRope, vision_angles, vision_positions
from qvl.types import Grid


def test_rms_norm_adds_the_residual() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(12, 1e-5, torch.float32)
    norm.weight = torch.nn.Parameter(torch.randn(12), requires_grad=False)
    x, residual = torch.randn(4, 12), torch.randn(4, 12)
    out, total = norm(x.clone(), residual.clone())
    assert torch.allclose(total, x + residual)
    assert torch.allclose(out, F.rms_norm(x + residual, (12,), norm.weight, 1e-5), atol=1e-6)


def test_merge_blocks_come_one_after_the_other() -> None:
    positions = vision_positions([Grid(2, 2, 4)], 2).tolist()
    block = [[0, 0], [0, 1], [1, 0], [1, 1]]
    next_block = [[y, x + 2] for y, x in block]
    assert positions == (block + next_block) * 2


def test_text_angles_are_ordinary_rotary_embeddings() -> None:
    """With the same index on all axes, the sections do not matter."""
    rope = MRope(8, 100.0, (1, 1, 2), torch.device("cpu"))
    cos, sin = rope(torch.arange(5).expand(3, 5))
    for position in range(5):
        for i in range(4):
            angle = position * 100.0 ** (-2 * i / 8)
            for column in (i, i + 4):
                assert cos[position, 0, column].item() == pytest.approx(math.cos(angle), abs=1e-6)
                assert sin[position, 0, column].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_each_section_follows_its_axis() -> None:
    rope = MRope(8, 100.0, (1, 1, 2), torch.device("cpu"))
    angles = rope(torch.tensor([[3], [5], [7]]))[1].asin()[0, 0, :4]
    frequency = [100.0 ** (-2 * i / 8) for i in range(4)]
    expected = torch.tensor([3 * frequency[0], 5 * frequency[1], 7 * frequency[2], 7 * frequency[3]])
    assert torch.allclose(angles.sin(), expected.sin(), atol=1e-6)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    torch.manual_seed(0)
    rope = MRope(16, 50.0, (2, 3, 3), torch.device("cpu"))
    q, k = torch.randn(1, 2, 16), torch.randn(1, 2, 16)

    def product(at: int, other: int) -> torch.Tensor:
        angles = [rope(torch.full((3, 1), p)) for p in (at, other)]
        return (rotate(q, *angles[0]) * rotate(k, *angles[1])).sum(-1)

    assert torch.allclose(product(9, 4), product(105, 100), atol=1e-4)
    assert not torch.allclose(product(9, 4), product(9, 5), atol=1e-2)
    assert torch.allclose(rotate(q, *rope(torch.full((3, 1), 7))).norm(dim=-1), q.norm(dim=-1), atol=1e-5)


def test_vision_angles_of_a_slice_repeat_in_time() -> None:
    cos, _ = vision_angles(torch.from_numpy(vision_positions([Grid(3, 2, 2)], 2)), 8)
    assert cos.shape == (12, 1, 8)
    assert torch.equal(cos[:4], cos[8:])


def test_activations() -> None:
    x = torch.linspace(-4, 4, 33)
    assert torch.allclose(ACTIVATIONS["quick_gelu"](x.clone()), x / (1 + torch.exp(-1.702 * x)), atol=1e-6)
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.allclose(silu_and_mul(torch.cat((gate, up), -1)), gate / (1 + torch.exp(-gate)) * up, atol=1e-6)
