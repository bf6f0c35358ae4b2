"""Embeddings of pictures by digest, bounded in bytes: pinned while a sequence still needs them, else kept by last use.

An entry is reserved by the scheduler (so that its bytes count at once) and filled by the vision step before the forward
pass that reads it. Knows digests, sizes and holders. Does not know tensors: a value is only stored and handed back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Entry(Generic[T]):
    num_bytes: int
    holders: set[Hashable] = field(default_factory=set)
    value: T | None = None


class EncoderCache(Generic[T]):
    """At most `capacity_bytes`, except that one entry larger than that is held while nothing else is pinned."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._pinned_bytes = 0
        self._entries: OrderedDict[bytes, _Entry[T]] = OrderedDict()

    def __contains__(self, digest: bytes) -> bool:
        """Whether it is there or will be in this step."""
        return digest in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def reserve(self, digest: bytes, num_bytes: int, holder: Hashable) -> bool:
        """Make room for a new entry, pinned by `holder`, that `put` will fill. False when pinned ones leave no room."""
        assert digest not in self._entries
        if self._pinned_bytes and self._pinned_bytes + num_bytes > self.capacity_bytes:
            return False
        self._evict(num_bytes)
        self._entries[digest] = _Entry(num_bytes)
        self.used_bytes += num_bytes
        self.pin(digest, holder)
        return True

    def has_room_ahead(self, num_bytes: int) -> bool:
        """Whether so much may be reserved for who does not need it yet: half of the capacity is left to who does."""
        return self._pinned_bytes + num_bytes <= self.capacity_bytes // 2

    def pin(self, digest: bytes, holder: Hashable) -> None:
        """Keep the entry until `holder` unpins it."""
        entry = self._entries[digest]
        if not entry.holders:
            self._pinned_bytes += entry.num_bytes
        entry.holders.add(holder)
        self._entries.move_to_end(digest)

    def unpin(self, digest: bytes, holder: Hashable) -> None:
        """`holder` needs it no more; unknown holders and entries are ignored (a failed picture has no entry)."""
        entry = self._entries.get(digest)
        if entry is None or holder not in entry.holders:
            return
        entry.holders.remove(holder)
        if not entry.holders:
            self._pinned_bytes -= entry.num_bytes
            self._evict(0)

    def put(self, digest: bytes, value: T) -> None:
        """Fill a reserved entry."""
        self._entries[digest].value = value

    def get(self, digest: bytes) -> T:
        """The value of a filled entry. Raises KeyError when there is none."""
        value = self._entries[digest].value
        if value is None:
            raise KeyError(digest)
        return value

    def is_filled(self, digest: bytes) -> bool:
        """Whether `get` would answer."""
        entry = self._entries.get(digest)
        return entry is not None and entry.value is not None

    def drop(self, digest: bytes) -> None:
        """Forget an entry, pinned or not: its picture could not be encoded."""
        entry = self._entries.pop(digest, None)
        if entry is not None:
            self.used_bytes -= entry.num_bytes
            if entry.holders:
                self._pinned_bytes -= entry.num_bytes

    def _evict(self, num_bytes: int) -> None:
        """Drop unpinned entries, least recently used first, until `num_bytes` more fit (or none is left)."""
        if self.used_bytes + num_bytes <= self.capacity_bytes:
            return
        for digest in [digest for digest, entry in self._entries.items() if not entry.holders]:
            self.drop(digest)
            if self.used_bytes + num_bytes <= self.capacity_bytes:
                return

    def check_integrity(self) -> None:
        """The byte counters agree with the entries."""
        entries = self._entries.values()
        assert self.used_bytes == sum(entry.num_bytes for entry in entries)
        assert self._pinned_bytes == sum(entry.num_bytes for entry in entries if entry.holders)
        alone = sum(1 for entry in entries if entry.holders) == 1 and len(self._entries) == 1
        assert self.used_bytes <= self.capacity_bytes or alone, "over capacity"
