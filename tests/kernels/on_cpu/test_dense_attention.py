"""Attention of prompts and pictures in 16 bits, on processors that gain by it; torch computes it on every processor,
and so does the compiled kernel, which spells out the processor's products where there are none.
"""

from __future__ import annotations

import platform

import pytest
import torch
from torch import Tensor

from qvl.kernels.fused import rotate
from qvl.kernels.native import NativeUnavailable
from qvl.kernels.on_cpu import dense_attention
from qvl.kernels.on_cpu.dense_attention import (
    DenseKernel,
    attended,
    attention_dtype,
    chosen_kernel,
    computes_right,
    dense_kernel,
    open_library,
)
from qvl.kernels.sdpa import PrefillChunk, attend_chunk
from qvl.kernels.segments import Segments, attend_by_torch
from tests.kernels.compiled import skip_without_compiler

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
    chunk = PrefillChunk(0, length - cached, blocks, length)
    assert torch.equal(chunk.mask, mask) if cached else chunk.mask is None
    exact = attend_chunk(q.double(), (keys.double(), values.double()), chunk)
    rounded = attend_chunk(q.bfloat16().double(), (keys.double(), values.double()), chunk)
    found = attend_chunk(q, (keys, values), chunk)
    assert found.dtype == BF16
    assert error(found, exact) < 2 * error(rounded, exact) + 2**-8


# --- the compiled kernel ----------------------------------------------------------------------------------------------

Angles = tuple[Tensor, Tensor]
FORMS = {"native": (), "AVX-512": ("-mno-avx512bf16",), "AVX2": ("-mno-avx512f",), "portable": ("-mno-avx",)}


@pytest.fixture(params=FORMS)
def compiled(request: pytest.FixtureRequest) -> DenseKernel:
    """As this processor takes it, and without its best instructions."""
    try:
        return DenseKernel(open_library(FORMS[request.param] if platform.machine() == "x86_64" else ()))
    except NativeUnavailable as error:
        skip_without_compiler(error)


@pytest.fixture(scope="module")
def native() -> DenseKernel:
    try:
        return DenseKernel(open_library())
    except NativeUnavailable as error:
        skip_without_compiler(error)


def no_turn(rows: int, dim: int) -> Angles:
    return torch.ones(rows, 1, dim), torch.zeros(rows, 1, dim)


def alone(qkv: Tensor, lengths: list[int]) -> Tensor:
    """Each segment written out."""
    return torch.cat([attended(*x.unbind(1), len(x)) for x in qkv.split(lengths)]).flatten(1)


@pytest.mark.parametrize("dim", [8, 16, 72, 80, 128, 256])
def test_segments_are_as_near_as_16_bits_allow(compiled: DenseKernel, dim: int) -> None:
    torch.manual_seed(0)
    lengths = [200, 200, 1, 63, 129]
    qkv = torch.randn(sum(lengths), 3, 3, dim)
    out = compiled.attend_segments(qkv, no_turn(len(qkv), dim), [(0, 2, 200), (400, 1, 1), (401, 1, 63), (464, 1, 129)])
    exact = alone(qkv.double(), lengths)
    assert error(out, exact) < 2 * error(alone(qkv.bfloat16().double(), lengths), exact)


def prompt(
    kernel: DenseKernel, chunk: int, length: int, dim: int = 128, page: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """(found, exact, the same with rounded queries), for six heads of queries and two of keys."""
    torch.manual_seed(length)
    q, needed = torch.randn(length, 6, dim)[length - chunk :], -(-length // page)
    keys, values = torch.randn(2, needed + 3, page, 2, dim).bfloat16()
    blocks, out = torch.randperm(needed + 3)[:needed], torch.empty_like(q)
    kernel.attend_prompt(q, (keys, values), blocks, length, out)
    k, v = (x[blocks].flatten(0, 1)[:length].double().repeat_interleave(3, dim=1) for x in (keys, values))
    exact, rounded = (attended(x.double(), k, v, length - chunk + 1) for x in (q, q.bfloat16()))
    return out, exact, rounded


@pytest.mark.parametrize("dim", [24, 128])
@pytest.mark.parametrize(
    ("chunk", "length", "page"), [(1, 1, 16), (51, 51, 16), (293, 293, 16), (70, 400, 16), (5, 133, 3)]
)
def test_prompts_see_what_came_before(compiled: DenseKernel, chunk: int, length: int, page: int, dim: int) -> None:
    out, exact, rounded = prompt(compiled, chunk, length, dim, page)
    assert error(out, exact) < 2 * error(rounded, exact) + 2**-9


def test_how_a_prompt_is_cut_changes_no_bit(native: DenseKernel) -> None:
    whole = prompt(native, 300, 300)[0]
    for chunk in (1, 7, 48, 200):
        assert torch.equal(prompt(native, chunk, 300)[0], whole[300 - chunk :])


def test_company_changes_no_bit(native: DenseKernel) -> None:
    torch.manual_seed(0)
    qkv, angles = torch.randn(600, 3, 2, 80), no_turn(600, 80)
    together = native.attend_segments(qkv, angles, [(0, 3, 200)])
    for i in range(0, 600, 200):
        own = native.attend_segments(qkv[i : i + 200].clone(), no_turn(200, 80), [(0, 1, 200)])
        assert torch.equal(own, together[i : i + 200])


@pytest.mark.parametrize("dim", [8, 24, 80])
def test_queries_and_keys_are_turned(compiled: DenseKernel, dim: int) -> None:
    torch.manual_seed(0)
    qkv, half = torch.randn(90, 3, 2, dim), (torch.rand(90, 1, dim // 2) * 6).repeat(1, 1, 2)
    angles = half.cos(), half.sin()
    turned = torch.stack([rotate(qkv[:, 0].clone(), *angles), rotate(qkv[:, 1].clone(), *angles), qkv[:, 2]], dim=1)
    exact = alone(turned.double(), [90])
    assert error(compiled.attend_segments(qkv, angles, [(0, 1, 90)]), exact) < 1e-2


def test_large_scores_overflow_nowhere(compiled: DenseKernel) -> None:
    """The largest comes last, in another panel than the first ones, which then count nothing."""
    torch.manual_seed(0)
    qkv = torch.randn(300, 3, 1, 16)
    qkv[:, 1] *= torch.linspace(1, 200, 300)[:, None, None]
    exact, rounded = alone(qkv.double(), [300]), alone(qkv.bfloat16().double(), [300])
    out = compiled.attend_segments(qkv, no_turn(300, 16), [(0, 1, 300)])
    assert error(out, exact) < 2 * error(rounded, exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_segment_breaks_itself_only(compiled: DenseKernel, bad: float) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(180, 3, 2, 16)
    qkv[70, 2, 0, 3] = bad
    qkv[75, 0, 1, 5] = bad
    out = compiled.attend_segments(qkv, no_turn(180, 16), [(0, 3, 60)])
    assert out[:60].isfinite().all()
    assert out[120:].isfinite().all()
    assert not out[60:120, 3].isfinite().any()
    assert out[75, 16:].isnan().all()


def test_what_lies_behind_a_prompt_does_not_reach_it(native: DenseKernel) -> None:
    keys, values = torch.randn(2, 2, 16, 1, 16).bfloat16()
    keys[1, 4:] = values[1, 4:] = float("nan")
    q = torch.randn(20, 2, 16)
    out = torch.empty_like(q)
    native.attend_prompt(q, (keys, values), torch.arange(2), 20, out)
    assert out.isfinite().all()


def test_only_bf16_is_rounded_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = DenseKernel(None)
    monkeypatch.setattr(dense_attention, "chosen_kernel", lambda: kernel)
    assert dense_kernel(BF16, FP32, 80) is kernel
    assert dense_kernel(FP32, FP32, 80) is None
    assert dense_kernel(torch.float16, FP32, 80) is None
    assert dense_kernel(BF16, FP32, 84) is None
    assert dense_kernel(BF16, FP32, 512) is None


def choose(monkeypatch: pytest.MonkeyPatch) -> DenseKernel | None:
    """On a processor with products of bf16, whatever this one is."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(dense_attention, "has_matrix_registers", lambda: False)
    return chosen_kernel.__wrapped__()


class Broken:
    """A library that claims to be right."""

    def __init__(self, library: object) -> None:
        self.library = library

    def __getattr__(self, name: str) -> object:
        return (lambda *_: None) if name == "qvl_attend_dense" else getattr(self.library, name)


def test_wrong_numbers_are_found(
    native: DenseKernel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert computes_right(native)
    broken = Broken(native.library)
    for name in ("qvl_dense_is_native", "qvl_dense_is_fast"):
        monkeypatch.setattr(broken, name, lambda: 1, raising=False)
    monkeypatch.setattr(dense_attention, "open_library", lambda: broken)
    assert choose(monkeypatch) is None
    assert "wrong numbers" in caplog.text


def test_where_pairs_are_slow_torch_attends(
    native: DenseKernel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Broken(native.library)
    monkeypatch.setattr(slow, "qvl_dense_is_native", lambda: 1, raising=False)
    monkeypatch.setattr(slow, "qvl_dense_is_fast", lambda: 0, raising=False)
    monkeypatch.setattr(dense_attention, "open_library", lambda: slow)
    assert choose(monkeypatch) is None
    assert caplog.text == ""


def test_without_a_compiler_torch_attends(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("QVL_NATIVE_KERNELS", "0")
    assert choose(monkeypatch) is None
    assert "left to torch" in caplog.text


def test_with_registers_for_matrices_torch_attends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(dense_attention, "has_matrix_registers", lambda: True)
    assert chosen_kernel.__wrapped__() is None
    assert caplog.text == ""
