"""Summaries that several processes of one server share: what one of them had summed up, the others find again.

One SQLite file in the server's own folder, gone with it, bounded in rows. It is a convenience: where it is busy or
broken nothing is found, and turns are summed up once more. Knows beginnings and texts. Does not know conversations.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from qvl.memory.summary import Running

MOST_SUMMARIES = 4096  # of some kilobytes each
_BUSY_SECONDS = 0.5
_AT_ONCE = 500  # names in one question; SQLite takes 999
_SETUP = """
pragma journal_mode = wal;
pragma synchronous = off;
create table if not exists summaries (beginning blob primary key, text text, tokens integer, used integer);
create index if not exists by_use on summaries (used);
"""

T = TypeVar("T")


class SharedSummaries:
    """For threads: every call may wait for a disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._opened: sqlite3.Connection | None = None

    def find(self, beginnings: Sequence[bytes]) -> Running | None:
        """The summary that stands for the most of the first messages, where there is one."""
        lengths = {name: length for length, name in enumerate(beginnings) if length}
        return self._try(lambda connection: _longest(connection, lengths))

    def keep(self, beginning: bytes, text: str, tokens: int) -> None:
        """What was not kept again for the longest time leaves."""
        self._try(lambda connection: _keep(connection, (beginning, text, tokens)))

    def _try(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """None where the file is busy or broken."""
        try:
            with self._lock, self._connection() as connection:  # a transaction
                return work(connection)
        except sqlite3.Error:
            return None

    def _connection(self) -> sqlite3.Connection:
        if self._opened is None:
            connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, check_same_thread=False)
            try:
                connection.executescript(_SETUP)
            except sqlite3.Error:
                connection.close()
                raise
            self._opened = connection
        return self._opened


def _longest(connection: sqlite3.Connection, lengths: dict[bytes, int]) -> Running | None:
    names = list(lengths)[::-1]  # the longest first
    for start in range(0, len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        marks = ",".join("?" * len(some))
        rows = connection.execute(
            f"select beginning, text, tokens from summaries where beginning in ({marks})", some
        ).fetchall()
        if rows:
            beginning, text, tokens = max(rows, key=lambda row: lengths[row[0]])
            return Running(text, lengths[beginning], tokens)
    return None


def _keep(connection: sqlite3.Connection, row: tuple[bytes, str, int]) -> None:
    connection.execute(
        "insert or replace into summaries values (?, ?, ?, (select coalesce(max(used), 0) + 1 from summaries))", row
    )
    connection.execute(
        "delete from summaries where used <= (select used from summaries order by used desc limit 1 offset ?)",
        (MOST_SUMMARIES,),
    )
