"""The output on disk: torn at any byte, damaged, changed input, two writers, order, and what is never lost."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from qvl.batch import JsonLines
from qvl.batch.ask import Reply
from qvl.batch.journal import Journal, Recovered
from qvl.batch.ledger import Ledger, scan
from qvl.batch.lines import answer_line, error_line
from qvl.errors import ConfigError, InvalidRequest, QvlError

COUNT = 6


def write_input(folder: Path, count: int = COUNT, word: str = "t") -> JsonLines:
    path = folder / "in.jsonl"
    lines = [
        {"custom_id": f"id{i}", "body": {"messages": [{"role": "user", "content": f"{word}{i}"}]}} for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return JsonLines(path)


def put(journal: Journal, ledger: Ledger, index: int, text: str = "answer", failed: bool = False) -> None:
    mark, name = ledger.mark(index), f"id{index}"
    if failed:
        journal.append(ledger, index, error_line(mark, name, InvalidRequest("no")))
    else:
        journal.append(ledger, index, answer_line(mark, name, Reply(200, json.dumps({"text": text}).encode())))


def answers(path: Path) -> list[tuple[str, str | None]]:
    told = [json.loads(line) for line in path.read_text().splitlines()]
    return [(a["custom_id"], a["response"] and a["response"]["body"]["text"]) for a in told]


def reopened(folder: Path, source: JsonLines, *, retry_failed: bool = False) -> tuple[Recovered, Ledger]:
    ledger = scan(source)
    with Journal(folder / "out.jsonl") as journal:
        return journal.open(ledger, retry_failed=retry_failed), ledger


def test_answers_in_any_order_end_in_order(tmp_path: Path) -> None:
    ledger = scan(write_input(tmp_path))
    with Journal(tmp_path / "out.jsonl") as journal:
        assert journal.open(ledger) == Recovered()
        for index in random.Random(1).sample(range(COUNT), COUNT):
            put(journal, ledger, index, f"a{index}")
        rows = [json.loads(row) for row in journal.part.read_text().splitlines()]  # a part can be read as it is
        assert {row["custom_id"] for row in rows} == {f"id{i}" for i in range(COUNT)}
        journal.finish(ledger)
    assert answers(tmp_path / "out.jsonl") == [(f"id{i}", f"a{i}") for i in range(COUNT)]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_a_part_torn_at_any_byte_keeps_every_whole_row(tmp_path: Path) -> None:
    source = write_input(tmp_path)
    ledger = scan(source)
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.open(ledger)
        for index in (2, 0, 4):
            put(journal, ledger, index)
        whole = journal.part.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        journal.part.write_bytes(whole[:cut])
        found, again = reopened(tmp_path, source)
        kept = sum(end <= cut for end in ends)
        assert (found.answered, again.num_answered) == (kept, kept)
        assert found.torn == (cut not in (0, *ends))
        size = journal.part.stat().st_size if journal.part.exists() else 0
        assert size == ([0, *ends][kept])


def test_a_row_damaged_in_the_middle_is_asked_again_and_the_rest_kept(tmp_path: Path) -> None:
    source = write_input(tmp_path)
    ledger = scan(source)
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.open(ledger)
        for index in range(COUNT):
            put(journal, ledger, index, f"a{index}")
        data = bytearray(journal.part.read_bytes())
    data[data.index(b'"a2"') + 1] ^= 1
    journal.part.write_bytes(data)
    ledger = scan(source)
    with Journal(tmp_path / "out.jsonl") as journal:
        assert journal.open(ledger) == Recovered(answered=COUNT - 1, torn=1)
        assert ledger.open_lines().tolist() == [2]
        put(journal, ledger, 2, "again")
        journal.finish(ledger)
    assert answers(journal.path)[2] == ("id2", "again")


def test_damage_between_writing_and_finishing_is_not_handed_on(tmp_path: Path) -> None:
    ledger = scan(write_input(tmp_path, 1))
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.open(ledger)
        put(journal, ledger, 0)
        data = bytearray(journal.part.read_bytes())
        data[60] ^= 1
        journal.part.write_bytes(data)
        with pytest.raises(QvlError, match="damaged"):
            journal.finish(ledger)
    assert not journal.path.exists()


def test_another_input_is_refused(tmp_path: Path) -> None:
    ledger = scan(write_input(tmp_path))
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.open(ledger)
        put(journal, ledger, 3)
    with pytest.raises(ConfigError, match="line 4 of the input has changed"):
        reopened(tmp_path, write_input(tmp_path, word="other"))
    with pytest.raises(ConfigError, match=r"1 answers .* belong to no line"):
        reopened(tmp_path, write_input(tmp_path, count=3))
    assert reopened(tmp_path, write_input(tmp_path, count=50))[0].answered == 1  # more lines at the end are welcome


def test_two_writers_never_meet(tmp_path: Path) -> None:
    source = write_input(tmp_path)
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.open(scan(source))
        with pytest.raises(ConfigError, match="another process"):
            reopened(tmp_path, source)
        assert journal.part.exists()  # the one who came second has not tidied up after the first


def test_nothing_is_lost_without_being_told_to(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out.jsonl")
    journal.check(resume=False, overwrite=False)
    for path in (journal.path, journal.part):
        path.write_text("precious")
        with pytest.raises(ConfigError, match="--resume goes on"):
            journal.check(resume=False, overwrite=False)
        journal.check(resume=True, overwrite=False)
        path.unlink()
    with pytest.raises(ConfigError, match="exclude each other"):
        journal.check(resume=True, overwrite=True)
    with pytest.raises(ConfigError, match="no folder"):
        Journal(tmp_path / "gone" / "out.jsonl").check(resume=False, overwrite=False)


def test_a_file_of_somebody_else_is_not_taken_for_answers(tmp_path: Path) -> None:
    source = write_input(tmp_path)
    (tmp_path / "out.jsonl").write_text('{"id":"batch_req_1","custom_id":"id0"}\n')
    with pytest.raises(ConfigError, match="did not write"):
        reopened(tmp_path, source)
    assert (tmp_path / "out.jsonl").exists()
    (tmp_path / "out.jsonl").unlink()
    part = tmp_path / "out.jsonl.part"
    part.write_text("my notes\n")
    with pytest.raises(ConfigError, match="not written by qvl batch"):
        reopened(tmp_path, source)
    assert part.read_text() == "my notes\n"


def finished(folder: Path, failed: tuple[int, ...] = ()) -> JsonLines:
    source = write_input(folder)
    ledger = scan(source)
    with Journal(folder / "out.jsonl") as journal:
        journal.open(ledger)
        for index in range(COUNT):
            put(journal, ledger, index, f"a{index}", failed=index in failed)
        journal.finish(ledger)
    return source


def test_a_finished_output_goes_on_with_more_lines(tmp_path: Path) -> None:
    finished(tmp_path)
    found, ledger = reopened(tmp_path, write_input(tmp_path, COUNT + 2))
    assert found.answered == COUNT
    assert ledger.open_lines().tolist() == [COUNT, COUNT + 1]


def test_a_crash_between_the_output_and_the_end_of_the_part(tmp_path: Path) -> None:
    """Both are there, complete: nothing is asked, nothing doubled."""
    source = write_input(tmp_path)
    ledger = scan(source)
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.open(ledger)
        for index in range(COUNT):
            put(journal, ledger, index, f"a{index}")
        part = journal.part.read_bytes()
        journal.finish(ledger)
    journal.part.write_bytes(part)
    ledger = scan(source)
    with Journal(tmp_path / "out.jsonl") as journal:
        assert journal.open(ledger).answered == COUNT
        journal.finish(ledger)
    assert answers(tmp_path / "out.jsonl") == [(f"id{i}", f"a{i}") for i in range(COUNT)]


@pytest.mark.parametrize("crash", [False, True])
def test_failed_lines_are_asked_again_only_when_wanted(tmp_path: Path, crash: bool) -> None:
    source = finished(tmp_path, failed=(1, 4))
    assert reopened(tmp_path, source)[0] == Recovered(COUNT, failed=2)
    (tmp_path / "out.jsonl.part").unlink()
    ledger = scan(source)
    with Journal(tmp_path / "out.jsonl") as journal:
        assert journal.open(ledger, retry_failed=True) == Recovered(COUNT - 2)
        assert ledger.open_lines().tolist() == [1, 4]
        put(journal, ledger, 4, "better")
        if not crash:
            put(journal, ledger, 1, "better too")
            journal.finish(ledger)
    if crash:
        found, ledger = reopened(tmp_path, source)  # line 1 keeps its error, which stands in the finished output
        assert (found, ledger.num_answered) == (Recovered(COUNT, failed=1), COUNT)
    else:
        assert answers(tmp_path / "out.jsonl")[1] == ("id1", "better too")
        assert answers(tmp_path / "out.jsonl")[4] == ("id4", "better")


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    source = finished(tmp_path)
    ledger = scan(source)
    with Journal(tmp_path / "out.jsonl") as journal:
        assert journal.open(ledger, overwrite=True) == Recovered()
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl"]  # nothing was answered, so nothing is left behind


def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_input(tmp_path)
    ledger = scan(source)
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.open(ledger)
        put(journal, ledger, 0)
        real = os.pwrite

        def full(file: int, data: bytes, offset: int) -> int:
            if len(data) > 20:
                return real(file, data[:20], offset)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(QvlError, match=r"No space left.*--resume"):
            put(journal, ledger, 1, "y" * 40)
        monkeypatch.undo()
    assert reopened(tmp_path, source)[0] == Recovered(answered=1, torn=1)
