"""How long GPU work takes when nothing is in its way, and how fast the GPU is at best.

Knows CUDA graphs and events. Does not know kernels.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

REPLAYS = 15
CACHED_BYTES = 400 << 20  # several times the L2 cache of any GPU: operands that are rotated among so many are not in it


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured, not quoted: bytes a second that are read and written, operations a second in 16 bits."""

    bandwidth: float
    operations: float


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement and what it had to do: each input read once, each output written once."""

    section: str
    name: str
    seconds: float
    num_bytes: float
    operations: float = 0.0

    def floor(self, ceilings: Ceilings) -> float:
        return max(self.num_bytes / ceilings.bandwidth, self.operations / ceilings.operations)

    def line(self, ceilings: Ceilings) -> str:
        floor = self.floor(ceilings)
        speed = f"{self.num_bytes / self.seconds / 1e12:6.2f} TB/s"
        if self.operations / ceilings.operations > self.num_bytes / ceilings.bandwidth:
            speed = f"{self.operations / self.seconds / 1e12:6.0f} TFLOP/s"
        times = f"{self.seconds * 1e6:9.1f} us  {speed:<14} {self.seconds / floor:5.2f} x floor"
        return f"{self.section:<10} {self.name:<58} {times}"


def seconds_of(calls: Sequence[Callable[[], Any]]) -> float:
    """The median time of one of `calls`, which are recorded one after the other in a CUDA graph and replayed."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_seconds(graph.replay) / len(calls)


def median_seconds(call: Callable[[], Any], replays: int = REPLAYS) -> float:
    """The median time of a call, by events, after two that do not count."""
    for _ in range(2):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]  # type: ignore[no-untyped-call]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    milliseconds: list[float] = [start.elapsed_time(end) for start, end in pairs]
    return statistics.median(milliseconds) / 1e3


def copies(num_bytes: int, most: int = 48) -> int:
    """How many operands of this size do not fit into a cache together."""
    return max(2, min(most, -(-CACHED_BYTES // num_bytes)))


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Random, because zeros are multiplied faster than anything real."""
    return torch.randn(*shape, device="cuda", dtype=dtype) * scale


def measure_ceilings() -> Ceilings:
    """A large copy, and a large product on random numbers."""
    large = [numbers(1 << 30) for _ in range(2)]
    bandwidth = 2 * large[0].nbytes / median_seconds(partial(large[0].copy_, large[1]))
    large.clear()
    square = [numbers(8192, 8192) for _ in range(2)]
    return Ceilings(bandwidth, 2 * 8192**3 / median_seconds(partial(torch.mm, *square)))
