"""How much memory this process may still take, by what Linux says of the machine and of its control group; and what it
no longer uses, given back.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

GIVE_BACK_SECONDS = 10.0  # a call takes some 20 ms where hundreds of MiB are in use, and pages that are used again more
KEPT = 256 << 20  # bytes of a piece that the C library keeps until then; MLPs of the largest pictures take 168 MiB
KEPT_BY_OLDER = 32 << 20  # the most that glibc before 2.35 can be told
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_..., of mallopt


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


class FreedMemory:
    """Pages that this process has freed: kept for a while, and given back to Linux now and then.

    Left alone, the C library gives large pieces back as they are freed, and Linux clears every page of the next one: a
    picture of 448 x 448 meets 400,000 new pages then and 40,000 so, a second of a processor's time. And it keeps for
    itself whatever something that lives on lies behind. On a CPU the embeddings of a picture lie behind the activations
    of its step: after thousands of pictures of all sizes the process would hold twice what it uses, and ever more.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._next = now() + GIVE_BACK_SECONDS
        library = ctypes.CDLL(None)
        self._trim = getattr(library, "malloc_trim", None)  # glibc's alone has it
        if self._trim is not None and any(library.mallopt(MMAP_THRESHOLD, size) for size in (KEPT, KEPT_BY_OLDER)):
            library.mallopt(TRIM_THRESHOLD, 2 * KEPT)

    def give_back(self) -> bool:
        """Whether it was time for it."""
        if self._now() < self._next or self._trim is None:
            return False
        self._trim(0)
        self._next = self._now() + GIVE_BACK_SECONDS
        return True
