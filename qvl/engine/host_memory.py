"""How much memory this process may still take, by what Linux says of the machine and of its control group."""

from __future__ import annotations

import os
from pathlib import Path


def available_host_memory() -> int:
    """Bytes that this process may still take: free memory of the machine, or less where its control group says so."""
    free = _meminfo_available()
    for group, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        folder = Path(group)
        try:
            taken = int((folder / used).read_text()) - _reclaimable(folder)
            free = min(free, int((folder / limit).read_text()) - taken)
        except (OSError, ValueError):  # no such control group, or its limit is the word "max"
            continue
    return max(free, 0)


def _meminfo_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux: half of what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _reclaimable(group: Path) -> int:
    """Bytes of files in the page cache that a control group counts as used and would give up when asked."""
    lines = (group / "memory.stat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "total_inactive_file"))
