"""Pictures that were loaded a short while ago, found again by what they were made of: the least used ones go first.

Whoever asks for a picture that another thread is making waits for that one. Bounded in bytes, thread-safe. Knows keys
and sizes. Does not know files or pixels.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

DEFAULT_BYTES = 256 << 20


@dataclass(slots=True, eq=False)
class _Making(Generic[T]):
    """One that is being made; `made` stays None where that failed."""

    over: threading.Event = field(default_factory=threading.Event)
    made: T | None = None


class Kept(Generic[T]):
    """At most `capacity` bytes of what `make` returned, as `num_bytes` counts them. 0 keeps nothing."""

    def __init__(self, num_bytes: Callable[[T], int], capacity: int = DEFAULT_BYTES) -> None:
        self.capacity = capacity
        self.used_bytes = 0
        self._num_bytes = num_bytes
        self._entries: OrderedDict[Hashable, T] = OrderedDict()
        self._making: dict[Hashable, _Making[T]] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept under `key`, else what `make` returns, which is kept from now on. Raises what `make` raises.

        A failure is nobody else's: who waited for it makes it again.
        """
        while True:
            with self._lock:
                if key in self._entries:
                    self._entries.move_to_end(key)
                    return self._entries[key]
                making = self._making.get(key)
                if making is None:
                    own = self._making[key] = _Making()
                    break
            making.over.wait()
            if making.made is not None:
                return making.made
        try:
            own.made = make()
            return own.made
        finally:
            with self._lock:
                del self._making[key]
                if own.made is not None:
                    self._keep(key, own.made)
            own.over.set()

    def _keep(self, key: Hashable, value: T) -> None:
        size = self._num_bytes(value)
        if size > self.capacity:
            return
        while self.used_bytes + size > self.capacity:
            _, oldest = self._entries.popitem(last=False)
            self.used_bytes -= self._num_bytes(oldest)
        self._entries[key] = value
        self.used_bytes += size
