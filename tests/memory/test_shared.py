"""Summaries found again by other processes: the longest one, bounded, and never a reason to fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qvl.memory import shared
from qvl.memory.shared import SharedSummaries
from qvl.memory.summary import Running

NAMES = tuple(bytes([number]) * 16 for number in range(6))


def test_the_longest_that_another_has_kept_is_found(tmp_path: Path) -> None:
    one, other = SharedSummaries(tmp_path / "summaries"), SharedSummaries(tmp_path / "summaries")
    assert other.find(NAMES) is None
    one.keep(NAMES[2], "short", 9)
    one.keep(NAMES[4], "long 摘要", 11)
    one.keep(b"another", "x", 1)
    assert other.find(NAMES) == Running("long 摘要", 4, 11)
    assert other.find(NAMES[:4]) == Running("short", 2, 9)
    assert other.find(NAMES[:2]) is None and other.find(()) is None
    other.keep(NAMES[4], "better", 7)
    assert one.find(NAMES) == Running("better", 4, 7)


def test_a_beginning_that_a_system_message_prolongs_counts_as_the_longer(tmp_path: Path) -> None:
    store = SharedSummaries(tmp_path / "summaries")
    store.keep(NAMES[1], "all", 3)
    assert store.find((NAMES[0], NAMES[1], NAMES[1])) == Running("all", 2, 3)


def test_in_conversations_of_any_length(tmp_path: Path) -> None:
    store = SharedSummaries(tmp_path / "summaries")
    names = [number.to_bytes(16, "big") for number in range(2500)]
    store.keep(names[3], "early", 3)
    assert store.find(names) == Running("early", 3, 3)
    store.keep(names[2400], "late", 4)
    assert store.find(names) == Running("late", 2400, 4)


def test_what_was_not_kept_again_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MOST_SUMMARIES", 3)
    store = SharedSummaries(tmp_path / "summaries")
    for name in NAMES[1:5]:
        store.keep(name, "x", 1)
        store.keep(NAMES[1], "still talked", 1)
    found = [store.find((b"", name)) is not None for name in NAMES[1:5]]
    assert found == [True, False, True, True]


def test_a_busy_or_broken_file_is_as_if_nothing_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_BUSY_SECONDS", 0.01)
    for path in (tmp_path / "no" / "folder", tmp_path / "broken", tmp_path):
        if path.name == "broken":
            path.write_bytes(b"this is no database" * 100)
        store = SharedSummaries(path)
        store.keep(NAMES[1], "x", 1)
        assert store.find(NAMES) is None
    store = SharedSummaries(tmp_path / "summaries")
    store.keep(NAMES[1], "x", 1)
    other = SharedSummaries(tmp_path / "summaries")
    assert other.find(NAMES) is not None
    other._connection().execute("begin exclusive")
    store.keep(NAMES[2], "y", 1)
    other._connection().rollback()
    assert store.find(NAMES) == Running("x", 1, 1)


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from qvl.memory.shared import SharedSummaries\n"
        "store = SharedSummaries(Path(sys.argv[1]))\n"
        "for number in range(50): store.keep(sys.argv[2].encode() + number.to_bytes(15, 'big'), sys.argv[2], number)\n"
        "name = sys.argv[2].encode() + (49).to_bytes(15, 'big')\n"
        "while not store.find([b'', name]): store.keep(name, 'last', 1)"  # one may find it busy for long
    )
    path = str(tmp_path / "summaries")
    running = [subprocess.Popen([sys.executable, "-c", code, path, name]) for name in ("a", "b")]
    assert [process.wait(120) for process in running] == [0, 0]
