"""What this process may take is something, and not more than the machine has."""

from __future__ import annotations

from pathlib import Path

from qvl.engine.host_memory import available_host_memory


def test_host_memory_is_what_is_left() -> None:
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    assert 0 < available_host_memory() < total * 1024
