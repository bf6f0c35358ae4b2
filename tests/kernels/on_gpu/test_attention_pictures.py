"""The kernel in CUDA for large segments: its source, and on a GPU where blocks share a tile's keys."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from qvl.kernels.gpu import HOPPER
from qvl.kernels.on_gpu import attention_pictures as pictures
from qvl.kernels.segments import scale_of, segment_kernel

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER, reason="no H100 or H200"
)
KINDS = [(80, torch.bfloat16), (80, torch.float16), (48, torch.bfloat16), (96, torch.float16)]


@pytest.mark.parametrize(("dim", "dtype"), KINDS)
def test_python_and_the_source_agree(dim: int, dtype: torch.dtype) -> None:
    source = pictures.source_of(dim, dtype)
    said = {name: int(value) for name, value in re.findall(r"\b([A-Z_]+) = (\d+)\b", source)}
    assert (said["D"], said["KEYS"], said["TEAMS"], said["STAGES"]) == (dim, 64, pictures.TEAMS, pictures.STAGES)
    assert pictures.TEAMS * said["ROWS"] == pictures.LARGE
    assert (said["TEAMS"] + 1) * said["TEAM"] == pictures.THREADS
    # Registers of all threads at the start are those of the teams and of the fetching in the end.
    assert said["TEAM_REGISTERS"] * said["TEAMS"] + said["FETCH_REGISTERS"] == 128 * (said["TEAMS"] + 1)
    assert f"m64n{dim + 8}k16" in source


@pytest.mark.parametrize(("dim", "dtype"), KINDS)
def test_the_source_compiles(dim: int, dtype: torch.dtype) -> None:
    from qvl.kernels.cuda_program import compile_now

    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="NVIDIA's bindings are not installed")
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # noqa: BLE001  # whatever the bindings raise without their library
        pytest.skip(f"NVRTC is not installed ({type(error).__name__})")
    assert compile_now(nvrtc, pictures.source_of(dim, dtype), "attention_pictures").startswith(b"\x7fELF")


def numbers(lengths: list[int], dtype: torch.dtype, heads: int = 4) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, 80, generator=generator, dtype=dtype, device="cuda")
    qkv[:, 0] *= scale_of(80)
    return qkv


def attended(qkv: Tensor, lengths: list[int]) -> Tensor:
    tiles = torch.from_numpy(pictures.tiles_of(lengths, pictures.LARGE)).cuda()
    return pictures.attend_segments(qkv.clone(), tiles, pictures.LARGE)


def exactly(qkv: Tensor, lengths: list[int]) -> Tensor:
    found = []
    for part in qkv.float().split(lengths):
        q, k, v = part.permute(1, 2, 0, 3)
        found.append(F.scaled_dot_product_attention(q, k, v, scale=math.log(2)).transpose(0, 1).flatten(1))
    return torch.cat(found)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "lengths", [[1], [64], [5476], [3100, 65, 500, 1, 64, 63, 192, 193], [4] * 40, [1024] * 4, [16384]]
)
def test_each_segment_is_attended_to_alone_and_the_same_each_time(lengths: list[int], dtype: torch.dtype) -> None:
    qkv = numbers(lengths, dtype)
    exact, first = exactly(qkv, lengths), attended(qkv, lengths)
    assert float((first.float() - exact).norm() / exact.norm()) < 5e-3
    for _ in range(5):
        assert torch.equal(attended(qkv, lengths), first)
    kernel = pictures.kernel_for(80, dtype, 0)
    assert all(not states.any() for _, states in kernel._places.values())


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("far", [40, 400])
def test_rows_that_are_computed_again_are_right(far: float) -> None:
    lengths = [3200, 100]
    for dtype in (torch.bfloat16, torch.float16):
        qkv = numbers(lengths, dtype)
        qkv[1000:1100, 1] *= far
        exact, out = exactly(qkv, lengths), attended(qkv, lengths)
        assert float((out.float() - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.gpu
@on_hopper
def test_launches_on_several_streams_do_not_meet() -> None:
    lengths = [3000, 2476]
    qkv = numbers(lengths, torch.bfloat16, heads=16)
    exact = attended(qkv, lengths)
    streams: list[torch.cuda.Stream] = [torch.cuda.Stream() for _ in range(3)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(attended(qkv, lengths))
    torch.cuda.synchronize()
    assert all(torch.equal(out, exact) for out in found)


@pytest.mark.gpu
@on_hopper
def test_a_recorded_launch_attends_to_the_tiles_that_it_then_finds() -> None:
    """With tiles of no rows behind them, as the tower's graphs have."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert segment_kernel(device, torch.bfloat16, 80) is not None
    many, few = [5476], [2000, 1700]
    memory = torch.zeros(5476, 3, 4, 80, dtype=torch.bfloat16, device="cuda")
    tiles = torch.zeros(40, pictures.FIELDS, dtype=torch.int32, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        pictures.attend_segments(memory, tiles, pictures.LARGE)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            pictures.attend_segments(memory, tiles, pictures.LARGE)
        for lengths in (many, few, many):
            qkv = numbers(lengths, torch.bfloat16)
            exact = exactly(qkv, lengths)
            memory[: len(qkv)] = qkv
            there = pictures.tiles_of(lengths, pictures.LARGE)
            padded = np.concatenate([there, np.tile(np.array((0, 0, 0, 1), dtype=np.int32), (40 - len(there), 1))])
            tiles.copy_(torch.from_numpy(padded))
            graph.replay()
            out = memory[: len(qkv), 0].flatten(1)
            assert float((out.float() - exact).norm() / exact.norm()) < 5e-3
