"""Attention inside segments against each segment alone, which kernel is taken where, and how segments become tiles."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels import segments
from qvl.kernels.fused import rotate
from qvl.kernels.gpu import HOPPER, KIB, shared_memory
from qvl.kernels.segments import (
    MANY,
    Segments,
    describe_segments,
    describe_torch,
    halves,
    preferred_order,
    segment_attention,
    segment_kernel,
)
from tests.kernels.gluon_source import compiled_for_hopper

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def each_alone(qkv: Tensor, angles: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
    """In the dtype of qkv, by torch's plainest way."""
    q, k, v = qkv.unbind(1)
    q, k = rotate(q.clone(), *angles), rotate(k.clone(), *angles)
    parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part).transpose(0, 1).flatten(1) for part in parts])


def some_angles(rows: int, dim: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    half = (torch.rand(rows, 1, dim // 2, device=device) * 6).repeat(1, 1, 2)
    return half.cos(), half.sin()


def test_segments_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    lengths = [4, 4, 6, 2, 2]
    qkv, angles = torch.randn(18, 3, 3, 8), some_angles(18, 8)
    exact = each_alone(qkv, angles, lengths)
    out = segment_attention(qkv, angles, Segments.of(lengths, CPU, torch.float32, 8))
    assert torch.allclose(out, exact, atol=1e-6)


def test_neighbours_of_one_length_are_one_group() -> None:
    assert Segments.of([4, 4, 6, 2, 2], CPU, torch.float32, 8).groups == [(0, 2, 4), (8, 1, 6), (14, 2, 2)]


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    "lengths", [[100 + 4 * i for i in range(MANY + 2)], [1, 128, 3, 700, 129], [256], [3100, 65, 500]]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_segments_of_many_lengths_on_a_gpu(lengths: list[int], dtype: torch.dtype) -> None:
    """Our kernel where it runs, and both ways of torch."""
    torch.manual_seed(0)
    qkv, angles = torch.randn(sum(lengths), 3, 4, 80, device="cuda"), some_angles(sum(lengths), 80, CUDA)
    exact = each_alone(qkv.to(dtype).float(), angles, lengths)
    ours = Segments.of(lengths, CUDA, dtype, 80)
    assert (ours.tiles is not None) == (torch.cuda.get_device_capability() == HOPPER)
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    ways = [ours, Segments(ours.groups, None, None, ours.longest)]
    if torch.cuda.get_device_capability() >= (8, 0):
        ways.append(Segments(ours.groups, None, bounds, ours.longest))
    with preferred_order(dtype, torch.cuda.get_device_capability()):
        for way in ways:
            assert relative_error(segment_attention(qkv.to(dtype), angles, way), exact) < 1e-2


@pytest.mark.gpu
@on_gpu
def test_what_lies_behind_a_segment_does_not_reach_it() -> None:
    """A picture whose numbers overflowed must not take its neighbours along."""
    torch.manual_seed(0)
    lengths = [200, 56, 300]
    qkv, angles = torch.randn(556, 3, 4, 80, device="cuda", dtype=torch.bfloat16), some_angles(556, 80, CUDA)
    exact = each_alone(qkv.float(), angles, lengths)
    qkv[200:256] = float("nan")
    out = segment_attention(qkv, angles, Segments.of(lengths, CUDA, torch.bfloat16, 80))
    assert relative_error(out[:200], exact[:200]) < 1e-2
    assert relative_error(out[256:], exact[256:]) < 1e-2
    assert out[200:256].isnan().all()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[300, 200], [1000], [3200, 100]])
def test_scores_far_above_those_of_the_last_keys_are_right(lengths: list[int], dtype: torch.dtype) -> None:
    """Our kernel shifts all exponentials by the maximum of a segment's last keys, with which it begins."""
    torch.manual_seed(0)
    rows = sum(lengths)
    qkv = torch.randn(rows, 3, 4, 80, device="cuda")
    qkv[:150, 1] *= 40
    assert_right_though_far(qkv, lengths, dtype)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[300, 200], [3200, 100]])
def test_scores_that_are_far_from_zero_all_together_are_right(lengths: list[int], dtype: torch.dtype) -> None:
    """All exponentials of a row vanish, or all overflow, where nothing is subtracted from its scores."""
    torch.manual_seed(0)
    rows = sum(lengths)
    qkv = torch.randn(rows, 3, 4, 80, device="cuda")
    qkv[:, 1] += 12
    qkv[0::2, 0] -= 1.5
    qkv[1::2, 0] += 1.5
    assert_right_though_far(qkv, lengths, dtype)


def assert_right_though_far(qkv: Tensor, lengths: list[int], dtype: torch.dtype) -> None:
    """Nothing is turned: large queries and keys rounded anew would be other scores. But our kernel has its own queries,
    as they are scaled before they are rounded.
    """
    rows = len(qkv)
    angles = torch.ones(rows, 1, 80, device="cuda"), torch.zeros(rows, 1, 80, device="cuda")
    segments_of_ours = Segments.of(lengths, CUDA, dtype, 80)
    given = qkv.to(dtype)
    rounded = given.float()
    if segments_of_ours.tiles is not None:
        rounded[:, 0] = (rounded[:, 0] * segments.scale_of(80)).to(dtype).float() / segments.scale_of(80)
    exact = each_alone(rounded, angles, lengths)
    assert relative_error(segment_attention(given, angles, segments_of_ours), exact) < 1e-2


@pytest.mark.parametrize(
    ("capability", "words", "cudnn"),
    [
        ((7, 5), "memory-efficient kernel", False),
        ((8, 0), "FlashAttention-2 (torch)", False),
        ((8, 6), "FlashAttention-2", False),
        ((8, 9), "FlashAttention-2", False),
        ((9, 0), "cuDNN", True),
        ((10, 0), "cuDNN", True),
        ((12, 0), "FlashAttention-2", False),
    ],
)
def test_torch_has_a_kernel_for_every_compute_capability(capability: tuple[int, int], words: str, cudnn: bool) -> None:
    assert words in describe_torch(torch.float16, capability)
    assert isinstance(preferred_order(torch.float16, capability), contextlib.nullcontext) != cudnn


def test_a_cpu_has_no_kernel_of_ours_beside_weights_of_many_bits() -> None:
    assert segment_kernel(CPU, torch.float32, 80) is None
    assert describe_segments(torch.float32, CPU, 80) == "torch SDPA"
    assert describe_segments(torch.float32, CPU, 80, torch.float16) == "torch SDPA"


# --- our kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [64, 192])
@pytest.mark.parametrize("lengths", [[1], [128], [129, 128, 5476], [4] * 9])
def test_every_query_row_is_in_one_tile(lengths: list[int], rows: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from qvl.kernels.on_gpu import attention_segments

    tiles = attention_segments.tiles_of(lengths, rows)
    assert tiles.dtype == np.int32
    covered = [row for first, count, _, _ in tiles.tolist() for row in range(first, first + count)]
    assert sorted(covered) == list(range(sum(lengths)))
    ends = np.cumsum(lengths)
    for first, count, key, keys in tiles.tolist():
        segment = int(np.searchsorted(ends, first, side="right"))
        assert (key, keys) == (ends[segment] - lengths[segment], lengths[segment])
        assert 0 < count <= rows
        assert first + count <= ends[segment]
    assert tiles[:, 3].tolist() == sorted(tiles[:, 3].tolist(), reverse=True)


def test_large_segments_take_the_kernel_in_cuda() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from qvl.kernels.on_gpu import attention_segments
    from qvl.kernels.on_gpu.attention_pictures import ENOUGH, LARGE, LONG, MIDDLE, SMALL, rows_for

    for lengths in ([4, LONG], [MIDDLE] * (ENOUGH // MIDDLE)):
        assert rows_for(lengths) == LARGE
        assert attention_segments.rows_for(lengths) == SMALL
    for lengths in ([LONG - 1], [MIDDLE - 1] * 9, [MIDDLE] * (ENOUGH // MIDDLE - 1), [MIDDLE] * 8 + [4]):
        assert rows_for(lengths) == SMALL


@pytest.mark.parametrize("works", ["attention_pictures", "attention_segments", ""])
def test_where_one_kernel_does_not_run_the_next_is_asked(works: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def tried_out(module: str, name: str, trial: Any, cost: str) -> Any:
        asked.append((module, cost))
        return module if module == works else None

    monkeypatch.setattr(segments, "capability_of", lambda device: HOPPER)
    monkeypatch.setattr(segments, "gpu_problem", lambda: None)
    monkeypatch.setattr(segments, "tried_out", tried_out)
    found: Any = segments.segment_kernel.__wrapped__(CUDA, torch.bfloat16, 80)
    assert found == (works or None)
    both = [("attention_pictures", segments.SLOWER_LARGE), ("attention_segments", segments.SLOWER)]
    assert asked == both[: 1 if works == "attention_pictures" else 2]


def test_which_head_dims_are_two_powers_of_two() -> None:
    assert {dim: halves(dim) for dim in (32, 48, 64, 72, 80, 96, 112, 128)} == {
        32: None, 48: (32, 16), 64: None, 72: None, 80: (64, 16), 96: (64, 32), 112: None, 128: None
    }  # fmt: skip


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_two_programs_fit_on_a_multiprocessor_and_keep_their_numbers_in_registers(
    dtype: torch.dtype, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from qvl.kernels.on_gpu.attention_segments import REGISTERS

    kernel = compiled_segments(dtype, name)
    assert 2 * (kernel.metadata.shared + KIB) <= shared_memory(HOPPER) + KIB  # the driver takes 1 KiB for each
    assert 2 * 32 * kernel.metadata.num_warps * REGISTERS <= 64 * KIB
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert "setmaxnreg" in ptx
    assert re.search(r"\bSTL\b", kernel.asm["sass"]) is None


def compiled_segments(dtype: torch.dtype, name: str) -> Any:
    """For the tower's head_dim, as `attend_segments` launches it."""
    from qvl.kernels.on_gpu import attention_segments
    from qvl.kernels.on_gpu.boxes import described

    dim = 80
    boxes = attention_segments.boxes_of(dim)
    flat = torch.empty(256, 3 * 16 * dim, dtype=dtype)
    layouts = [one.descriptor.layout for one in described(flat, *boxes)]
    types: dict[str, str] = {
        argument: f"tensordesc<{name}[{length}, {columns}],{layout!r}>"
        for argument, (length, columns), layout in zip(
            ("q_low", "q_high", "k_low", "k_high"), boxes, layouts, strict=True
        )
    }
    types |= {"tiles_ptr": "*i32", "out_ptr": f"*{name}", "stride": "i32", "tiles": "i32", "width": "i32"}
    types["limit"] = "fp32"
    constants = {
        "D": dim,
        "KEYS": attention_segments.KEYS,
        "STAGES": attention_segments.STAGES,
        "FIELDS": attention_segments.FIELDS,
    }
    aligned = ("tiles_ptr", "out_ptr", "stride", "width")
    return compiled_for_hopper(attention_segments._segments, types, constants, aligned, attention_segments.REGISTERS)
