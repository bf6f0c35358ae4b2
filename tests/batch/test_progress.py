"""What is shown while a batch runs, and what is told at its end."""

from __future__ import annotations

import pytest

from qvl.batch.progress import Pace, _state, duration, progress
from qvl.batch.report import Report


def test_rate_and_time_left_are_those_of_the_last_half_minute() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    report = Report(total=1000, before=100)
    assert pace.told(report) == "-- left"
    now, report.answered = 10.0, 50
    assert pace.told(report) == "5.0/s, 2:50 left"
    for second in range(11, 100):  # it has become slower
        now, report.answered = float(second), report.answered + 1
        told = pace.told(report)
    assert told.startswith("1.0/s")


def test_durations() -> None:
    assert [duration(s) for s in (0, 9.6, 75, 3675, 360_000)] == ["0:00", "0:10", "1:15", "1:01:15", "100:00:00"]


def test_what_keeps_it_waiting_is_said_in_few_words() -> None:
    report = Report(10, failed=2, trouble="no connection to " + "somewhere " * 20)
    told = _state(report, 3, "1.0/s, 0:10 left")
    assert told.startswith("waiting, 2 failed: no connection to")
    assert len(told) < 90
    report.trouble = ""
    assert _state(report, 3, "1.0/s, 0:10 left") == "1.0/s, 0:10 left, 3 under way, 2 failed"


def test_a_pipe_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("qvl.batch.progress.LINE_SECONDS", 0.0)
    with progress(quiet=False) as show:
        show(Report(10, answered=4), 2)
    assert capsys.readouterr().err == "qvl: 4/10 -- left, 2 under way\n"
    with progress(quiet=True) as show:
        show(Report(10, answered=4), 2)
    assert capsys.readouterr() == ("", "")


def test_the_report_tells_people_and_programs_the_same() -> None:
    report = Report(10, before=2, failed_before=1, seconds=2.0, concurrency=4, where="http://x", asked_again=3)
    for number in range(6):
        report.add_answer(0.1 * (number + 1), number, f"id{number}", (100, 10))
    report.add_failure("invalid_media")
    told = report.as_dict()
    assert (told["answered"], told["failed"], told["lines_per_second"]) == (6, 1, 3.5)
    assert (told["prompt_tokens"], told["completion_tokens"]) == (600, 60)
    assert [slow["custom_id"] for slow in told["slowest"]] == ["id5", "id4", "id3", "id2", "id1"]
    assert told["errors"] == {"invalid_media": 1}
    assert (report.done, report.any_failed) == (9, True)
    lines = "\n".join(report.lines())
    counts = "6 answered, 1 failed, 2 from an earlier run (1 failed), 3 asked again"
    details = ("3.5 lines/s", "at most 4 at once, by http://x", "600 prompt tokens", "line 5 0.60 s", "invalid_media 1")
    assert [said for said in (counts, *details) if said not in lines] == []
