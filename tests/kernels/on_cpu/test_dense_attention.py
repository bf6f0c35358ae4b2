"""Attention of prompts and pictures in 16 bits, on processors that gain by it; torch computes it on every processor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qvl.kernels.on_cpu import dense_attention
from qvl.kernels.on_cpu.dense_attention import attention_dtype
from qvl.kernels.sdpa import PrefillChunk, attend_chunk
from qvl.kernels.segments import Segments, attend_by_torch

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_attention, "has_matrix_registers", lambda: True)


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def test_only_bf16_beside_fp32_and_only_where_it_gains(registers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention_dtype(BF16, FP32) == BF16
    assert attention_dtype(FP32, FP32) == FP32
    assert attention_dtype(torch.float16, FP32) == FP32
    monkeypatch.setattr(dense_attention, "has_matrix_registers", lambda: False)
    assert attention_dtype(BF16, FP32) == FP32


def test_pictures_are_as_near_as_queries_of_16_bits_allow(registers: None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(70, 2, 16) for _ in range(3))
    device = torch.device("cpu")
    narrow = attend_by_torch(q, k, v, Segments.of([30, 30, 10], device, FP32, 16, BF16))
    wide = attend_by_torch(q, k, v, Segments.of([30, 30, 10], device, FP32, 16, FP32))
    plain = Segments([(0, 2, 30), (60, 1, 10)], None, None, 30)
    exact = attend_by_torch(q.double(), k.double(), v.double(), plain)
    rounded = attend_by_torch(q.bfloat16().double(), k.bfloat16().double(), v.bfloat16().double(), plain)
    assert narrow.dtype == wide.dtype == FP32
    assert error(wide, exact) < 1e-6
    assert 1e-4 < error(narrow, exact) < 2 * error(rounded, exact)


@pytest.mark.parametrize("cached", [0, 7])
def test_prompts_are_as_near_as_a_cache_of_16_bits_allows(registers: None, cached: int) -> None:
    torch.manual_seed(0)
    length, blocks = 40, torch.tensor([2, 0, 1])
    q, keys, values = torch.randn(length - cached, 4, 16), *torch.randn(2, 3, 16, 2, 16).bfloat16()
    mask = torch.arange(length) <= torch.arange(cached, length)[:, None]
    chunk = PrefillChunk(0, length - cached, blocks, length, mask if cached else None)
    exact = attend_chunk(q.double(), (keys.double(), values.double()), chunk)
    rounded = attend_chunk(q.bfloat16().double(), (keys.double(), values.double()), chunk)
    found = attend_chunk(q, (keys, values), chunk)
    assert found.dtype == BF16
    assert error(found, exact) < 2 * error(rounded, exact) + 2**-8
