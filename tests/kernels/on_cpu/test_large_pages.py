"""Large pages are asked for around weights, and change nothing of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from qvl.kernels.on_cpu.large_pages import LARGE, in_large_pages
from qvl.kernels.on_cpu.linear_codes import QuantisedMatrix


def flags_at(address: int) -> list[str]:
    """What the system notes about the memory there; "hg" is asked-for large pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address < last
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no such memory")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's own")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without large pages")
def test_large_tensors_ask_for_them() -> None:
    weights = in_large_pages(torch.empty(64 << 20, dtype=torch.uint8))
    assert "hg" in flags_at(weights.data_ptr() + (32 << 20))
    codes = QuantisedMatrix.empty(8, 8192, 8192).codes
    assert "hg" in flags_at(codes.data_ptr() + (32 << 20))


@pytest.mark.parametrize("size", [0, 1, LARGE, 2 * LARGE, 2 * LARGE + 1, 40 << 20])
def test_what_is_stored_stays(size: int) -> None:
    memory = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    before = memory.clone()
    assert in_large_pages(memory) is memory
    assert torch.equal(memory, before)
