"""How pictures and videos of many requests are loaded at a time: many wait for the network, few use the cores.

Decoding, resizing and hashing beyond the number of cores would only make each of them slower and hold more pixels in
memory. Knows turns and order. Does not know pictures.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

P = TypeVar("P")
T = TypeVar("T")

MOST_THREADS = 64


class Loading:
    """`gate` lets `cores` threads compute at a time. Thread-safe."""

    def __init__(self, cores: int | None = None) -> None:
        self.gate = threading.BoundedSemaphore(max(1, cores or os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(MOST_THREADS, "qvl-media-more")

    def in_order(self, load: Callable[[P], T], parts: Sequence[P]) -> Iterator[T]:
        """`load` of each of `parts`, all at the same time, results and errors in their order.

        The first is loaded by the calling thread, so that requests with one picture pay nothing for this. After an
        error what has not begun is left out.
        """
        later = [self._pool.submit(contextvars.copy_context().run, load, part) for part in parts[1:]]
        try:
            if parts:
                yield load(parts[0])
            for future in later:
                yield future.result()
        finally:
            for future in later:
                future.cancel()

    def begin(self, work: Callable[[], T]) -> Future[T]:
        """`work` in another thread, beside who calls."""
        return self._pool.submit(contextvars.copy_context().run, work)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
