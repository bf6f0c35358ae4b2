"""What the HTTP processes of one server know of each other: a small table of integers in memory that they share.

One row per process, written by that process alone, and a head that their parent writes. Sums are read without a lock:
two processes may each let a request in for the last place, which is one too many for as long as that request runs.
Knows places in a table. Does not know what is done about the numbers.
"""

from __future__ import annotations

import mmap
from pathlib import Path

_HEAD = 1
_RUNNING, _HELD, _ROW = 0, 1, 2
_CELL_BYTES = 8


class Counts:
    """Row `row` of a table, and the sums over all rows. Without a table: a server of one process."""

    def __init__(self, table: memoryview | None = None, row: int = 0) -> None:
        self._table = table if table is not None else memoryview(bytearray(table_bytes(1))).cast("q")
        self._base = _HEAD + _ROW * row
        self._rows = range(_HEAD, len(self._table), _ROW)

    @property
    def running(self) -> int:
        """Requests in this process."""
        return self._table[self._base + _RUNNING]

    @running.setter
    def running(self, value: int) -> None:
        self._table[self._base + _RUNNING] = value

    @property
    def all_running(self) -> int:
        return sum(self._table[row + _RUNNING] for row in self._rows)

    @property
    def held_bytes(self) -> int:
        """Bytes of request bodies in this process."""
        return self._table[self._base + _HELD]

    @held_bytes.setter
    def held_bytes(self, value: int) -> None:
        self._table[self._base + _HELD] = value

    @property
    def all_held_bytes(self) -> int:
        return sum(self._table[row + _HELD] for row in self._rows)

    @property
    def engine_restarts(self) -> int:
        """Written by the parent."""
        return self._table[0]

    @engine_restarts.setter
    def engine_restarts(self, value: int) -> None:
        self._table[0] = value

    def clear(self) -> None:
        """The process of this row is gone, and all that it held."""
        self.running = self.held_bytes = 0


def table_bytes(rows: int) -> int:
    """The size of a table."""
    return _CELL_BYTES * (_HEAD + _ROW * rows)


def open_table(path: Path) -> memoryview:
    """The table in a file of `table_bytes(rows)` bytes; it stays mapped for as long as it is used."""
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
