"""Progress on standard error: a bar in a terminal, a line now and then in a pipe or a log. Knows counts only."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from textwrap import shorten

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from qvl.batch.report import Report

LINE_SECONDS = 10.0
TROUBLE_CHARS = 60
RATE_SECONDS = 30.0  # what was slow an hour ago says little about what is left

Show = Callable[[Report, int], None]  # called now and then, with how many requests are under way


class Pace:
    """The recent rate, and what it says about the time left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def told(self, report: Report) -> str:
        now = self._clock()
        self._seen.append((now, report.done))
        while len(self._seen) > 2 and now - self._seen[0][0] > RATE_SECONDS:
            self._seen.popleft()
        seconds, count = now - self._seen[0][0], report.done - self._seen[0][1]
        if seconds <= 0 or count <= 0:
            return "-- left"
        rate = count / seconds
        return f"{rate:.1f}/s, {duration((report.total - report.done) / rate)} left"


def duration(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress(*, quiet: bool) -> Iterator[Show]:
    """What to call with the counts as they grow."""
    console = Console(stderr=True)
    if quiet:
        yield lambda report, running: None
    elif console.is_terminal:
        with _bar(console) as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _bar(console: Console) -> Iterator[Show]:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    pace = Pace()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)

        def show(report: Report, running: int) -> None:
            told = _state(report, running, pace.told(report))
            bar.update(task, total=report.total, completed=report.done, description=told)

        yield show


def _state(report: Report, running: int, rate: str) -> str:
    failed = f", {report.failed} failed" if report.failed else ""
    if report.trouble:
        return f"waiting{failed}: {shorten(report.trouble, TROUBLE_CHARS, placeholder='...')}"
    return f"{rate}, {running} under way{failed}"


def _lines() -> Show:
    pace = Pace()
    last = time.monotonic()

    def show(report: Report, running: int) -> None:
        nonlocal last
        told = _state(report, running, pace.told(report))
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            print(f"qvl: {report.done}/{report.total} {told}", file=sys.stderr, flush=True)

    return show
