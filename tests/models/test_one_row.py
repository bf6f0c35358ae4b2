"""The decoder for one row: its wiring on a CPU with products written out, and on a GPU against the one for many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels import linear
from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration
from tests.kernels.failing import PROBLEMS, warning_of
from tests.models import oracle


class WrittenOut:
    """`qvl.kernels.linear.OneRow` in torch."""

    calls = 0

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        scales: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        bias: Tensor | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
        early: bool = False,
    ) -> Tensor:
        self.calls += 1
        assert not early  # a CPU
        x = x if norm is None else F.rms_norm(x, (x.shape[1],), norm, eps)
        out = F.linear(x, weight.float() if scales is None else weight.float() * scales[:, None], bias)
        if gated:
            gate, up = out.chunk(2, dim=1)
            out = F.silu(gate) * up
        return out if residual is None else out + residual


@pytest.mark.parametrize("name", ["text", "pictures"])
def test_rows_one_by_one_equal_many(checkpoints: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    reference, ours = oracle.load_reference(checkpoints[0]), oracle.load_ours(checkpoints[0])
    case = oracle.make_case(reference.config, name)
    positions = oracle.reference_positions(reference, case)
    expected = oracle.our_logits(ours, case, positions, reference.config, 3)
    kernels = WrittenOut()
    monkeypatch.setattr(
        Qwen2VLForConditionalGeneration, "one_row_kernels", lambda self, x: kernels if len(x) == 1 else None
    )
    out = oracle.our_logits(ours, case, positions, reference.config, 1)
    assert kernels.calls >= 4 * len(ours.model.layers)
    assert oracle.relative_error(out, expected) < 1e-5


def test_a_cpu_has_no_kernel_for_one_row(checkpoints: tuple[Path, ...]) -> None:
    ours: Any = oracle.load_ours(checkpoints[0])
    assert ours.one_row_kernels(torch.zeros(1, ours.spec.text.hidden_size)) is None
    assert linear.one_row(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_kernel_that_fails_its_trial_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, problem: str
) -> None:
    said = warning_of(problem, "qvl.kernels.on_gpu.linear_row", linear, linear.one_row, monkeypatch, caplog)
    assert "15 % longer" in said
