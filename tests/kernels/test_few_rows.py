"""Which products of 2 to 64 rows go to a kernel of their own, and that the decoder takes what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels import few_rows
from qvl.kernels.few_rows import MOST
from qvl.kernels.sums import Sums
from tests.kernels.failing import PROBLEMS, warning_of
from tests.models import oracle

CPU = torch.device("cpu")


class WrittenOut:
    """`qvl.kernels.few_rows.FewRows` in torch: what it leaves comes in three parts."""

    calls = 0

    def takes(self, weight: Tensor, gated: bool) -> bool:
        return weight.shape[0] % 2 == 0

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sums:
        self.calls += 1
        pairs = zip(x.chunk(3, dim=1), weight.float().chunk(3, dim=1), strict=True)
        parts = [F.linear(*pair) for pair in pairs]
        parts[0] = parts[0] if bias is None else parts[0] + bias
        return Sums(torch.stack(parts), x.dtype)

    def gated_product(self, x: Tensor, weight: Tensor) -> Tensor:
        self.calls += 1
        gate, up = F.linear(x, weight.float()).chunk(2, dim=1)
        return F.silu(gate) * up


@pytest.mark.parametrize("name", ["text", "pictures"])
def test_a_network_of_few_rows_equals_one_of_many(
    checkpoints: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Steps of five rows, so that the rest of a prompt goes the other way."""
    reference, ours = oracle.load_reference(checkpoints[0]), oracle.load_ours(checkpoints[0])
    case = oracle.make_case(reference.config, name)
    positions = oracle.reference_positions(reference, case)
    expected = oracle.our_logits(ours, case, positions, reference.config, 5)
    kernel = WrittenOut()
    monkeypatch.setattr(few_rows, "kernel_for", lambda x, weight, gated: kernel if len(x) == 5 else None)
    out = oracle.our_logits(ours, case, positions, reference.config, 5)
    assert kernel.calls >= 3 * len(ours.model.layers)
    assert oracle.relative_error(out, expected) < 1e-5


def test_a_cpu_has_no_kernel_for_few_rows() -> None:
    x, weight = torch.zeros(8, 256), torch.zeros(128, 256)
    assert few_rows.few_rows(CPU, torch.float32) is None
    assert few_rows.sums_of_few(x, weight, None) is None
    assert few_rows.gated_few(x, weight) is None


class OnGpu:
    """As much of a tensor as the choice looks at."""

    is_cuda = True
    device = CPU
    dtype = torch.bfloat16

    def __init__(self, rows: int, contiguous: bool = True) -> None:
        self.shape = (rows, 256)
        self.contiguous = contiguous

    def is_contiguous(self) -> bool:
        return self.contiguous


def test_only_two_to_sixty_four_rows_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel: Any = WrittenOut()
    monkeypatch.setattr(few_rows, "few_rows", lambda device, dtype: kernel)
    weight = torch.zeros(128, 256)

    def taken(x: Any, weight: Tensor = weight) -> bool:
        return few_rows.kernel_for(x, weight, False) is kernel

    assert [taken(OnGpu(rows)) for rows in (1, 2, MOST, MOST + 1)] == [False, True, True, False]
    assert not taken(OnGpu(8, contiguous=False))
    assert not taken(OnGpu(8), torch.zeros(127, 256))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_kernel_that_fails_its_trial_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, problem: str
) -> None:
    choose = few_rows.few_rows
    said = warning_of(problem, "qvl.kernels.on_gpu.linear_few", few_rows, choose, monkeypatch, caplog)
    assert few_rows.SLOWER in said
