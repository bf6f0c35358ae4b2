"""The choice of a paged attention: every compute capability, faked; every reason to fall back; every word asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl.errors import ConfigError
from qvl.kernels import attention, gpu
from qvl.kernels.attention import choose_attention
from qvl.kernels.sdpa import GatherAttention
from qvl.kernels.trial import problem_of
from qvl.layers.attention import Heads

HEADS = Heads(num_heads=28, num_kv_heads=4, head_dim=128)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def not_tried_yet() -> Iterator[None]:
    attention.triton_gpu.cache_clear()
    yield
    attention.triton_gpu.cache_clear()


@pytest.fixture
def gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which every kernel builds and gives right numbers, as far as the choice can see."""
    pytest.importorskip("qvl.kernels.on_gpu.paged_attention", reason="Triton is not installed")
    monkeypatch.setattr(attention, "gpu_problem", lambda: None)
    monkeypatch.setattr(attention, "problem_of", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))


@pytest.mark.usefixtures("gpu_at_hand")
@pytest.mark.parametrize(
    ("capability", "dtype", "shared", "prefill"),
    [
        ((7, 5), torch.float16, 64, "torch SDPA for prefill"),
        ((8, 0), torch.bfloat16, 163, "paged prefill (128-row tiles"),
        ((8, 6), torch.bfloat16, 99, "paged prefill (64-row tiles"),
        ((8, 9), torch.float16, 99, "paged prefill (64-row tiles"),
        ((9, 0), torch.bfloat16, 227, "128-row tiles by TMA for long prompts"),
        ((9, 0), torch.float16, 227, "128-row tiles by TMA for long prompts"),
        ((10, 0), torch.bfloat16, 227, "paged prefill (64-row tiles"),
        ((10, 3), torch.bfloat16, 227, "paged prefill (64-row tiles"),
        ((12, 0), torch.bfloat16, 99, "paged prefill (64-row tiles"),
    ],
)
def test_every_compute_capability_has_a_path(
    capability: tuple[int, int], dtype: torch.dtype, shared: int, prefill: str
) -> None:
    chosen, reason = choose_attention(CUDA, dtype, HEADS, capability)
    assert chosen.name == "triton"
    assert chosen.graph_safe
    assert f"compute capability {capability[0]}.{capability[1]}" in reason
    assert prefill in reason
    assert gpu.shared_memory(capability) == shared * 1024


@pytest.mark.usefixtures("gpu_at_hand")
@pytest.mark.parametrize(
    ("dtype", "heads", "capability", "why"),
    [
        (torch.bfloat16, HEADS, (7, 5), "bfloat16 on compute capability 7.5"),
        (torch.float16, HEADS, (7, 0), "float16 on compute capability 7.0"),
        (torch.bfloat16, Heads(8, 8, 80), (9, 0), "head_dim 80"),
    ],
)
def test_what_triton_cannot_run_torch_does(
    dtype: torch.dtype, heads: Heads, capability: tuple[int, int], why: str
) -> None:
    chosen, reason = choose_attention(CUDA, dtype, heads, capability)
    assert chosen.name == "gather+sdpa"
    assert not chosen.graph_safe
    assert why in reason


@pytest.mark.parametrize("problem", ["wrong", "raises"])
def test_a_kernel_that_fails_its_trial_is_left_out_with_one_warning(
    gpu_at_hand: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, problem: str
) -> None:
    def fails(*_: object) -> str:
        if problem == "raises":
            raise RuntimeError("ptxas died\nand said more")
        return "the attention kernel gave wrong numbers"

    gpu.warn_of.cache_clear()
    monkeypatch.setattr(attention, "problem_of", fails)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            chosen, reason = choose_attention(CUDA, torch.bfloat16, HEADS, (8, 0))
            assert chosen.name == "gather+sdpa"
            assert ("wrong numbers" if problem == "wrong" else "RuntimeError: ptxas died") in reason
    (warning,) = caplog.records
    assert "several times longer" in warning.getMessage()


@pytest.mark.usefixtures("gpu_at_hand")
def test_where_the_kernel_for_prompts_fails_the_one_for_every_gpu_takes_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.warn_of.cache_clear()
    monkeypatch.setattr(attention, "problem_of", lambda way, *_: "wrong numbers" if way.prompts else None)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            reason = choose_attention(CUDA, torch.bfloat16, HEADS, (9, 0))[1]
            assert "by TMA" not in reason
    (warning,) = caplog.records
    assert "wrong numbers" in warning.getMessage()
    assert "longer" in warning.getMessage()


@pytest.mark.usefixtures("gpu_at_hand")
def test_heads_that_the_kernel_for_prompts_does_not_know_go_the_other_way() -> None:
    assert "by TMA" not in choose_attention(CUDA, torch.bfloat16, Heads(16, 4, 64), (9, 0))[1]


def test_without_triton_there_is_one_warning_with_reason_and_cost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "qvl.kernels.on_gpu.ops", None)
    monkeypatch.delattr(sys.modules["qvl.kernels.on_gpu"], "ops", raising=False)
    gpu.warn_of.cache_clear()
    gpu.gpu_problem.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                chosen, reason = choose_attention(CUDA, torch.bfloat16, HEADS, (9, 0))
        assert chosen.name == "gather+sdpa"
        assert "Triton cannot be imported" in reason
        (warning,) = caplog.records
        assert "slower" in warning.getMessage()
    finally:
        gpu.gpu_problem.cache_clear()


@pytest.mark.usefixtures("gpu_at_hand")
def test_a_backend_can_be_forced() -> None:
    chosen, reason = choose_attention(CUDA, torch.bfloat16, HEADS, (9, 0), "sdpa")
    assert chosen.name == "gather+sdpa"
    assert "as asked for" in reason
    assert choose_attention(CUDA, torch.bfloat16, HEADS, (9, 0), "triton")[0].name == "triton"
    assert choose_attention(CPU, torch.float32, HEADS, None, "sdpa")[0].name == "gather+sdpa"


def test_a_forced_backend_that_cannot_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'attention_backend' triton cannot run here: it needs a CUDA GPU"):
        choose_attention(CPU, torch.float32, HEADS, None, "triton")
    with pytest.raises(ConfigError, match="cpu cannot run here"):
        choose_attention(CUDA, torch.bfloat16, HEADS, (9, 0), "cpu")


def test_the_choice_on_a_cpu_has_a_reason() -> None:
    chosen, reason = choose_attention(CPU, torch.float32, HEADS)
    assert chosen.name in reason


def test_the_trial_tells_right_from_wrong() -> None:
    heads = Heads(4, 2, 16)

    class Halved(GatherAttention):
        def run(self, qkv: Tensor, angles: Any, kv: Any, plan: Any) -> Tensor:
            return super().run(qkv, angles, kv, plan) / 2

    assert problem_of(GatherAttention(), heads, CPU, torch.float32) is None
    said = problem_of(Halved(), heads, CPU, torch.float32)
    assert said is not None
    assert "wrong numbers (relative error 5" in said


@pytest.mark.usefixtures("gpu_at_hand")
def test_kernels_that_run_are_tried_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(attention, "problem_of", lambda way, *_: tried.append(way))
    first, again = (choose_attention(CUDA, torch.bfloat16, HEADS, (9, 0)) for _ in range(2))
    assert len(tried) == 1 and first == again
