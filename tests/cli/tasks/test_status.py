"""The line on the terminal: there while work is under way, gone when there is something to read, never in a pipe."""

from __future__ import annotations

import io
import sys
import time

import pytest

from qvl.cli.tasks.status import Status, tell
from qvl.tasks.inputs import Item
from qvl.types import TextPart
from tests.cli.tasks.terminal import Terminal


def items(*names: str) -> list[Item]:
    return [Item(name, lambda: TextPart("")) for name in names]


def until(terminal: Terminal, text: str) -> None:
    end = time.monotonic() + 60
    while text not in terminal.getvalue():
        assert time.monotonic() < end, terminal.getvalue()
        time.sleep(0.01)


def test_it_tells_where_the_work_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    with Status("ocr", items("a.png", "x" * 200 + "b.png"), quiet=False) as status:
        status.hear("hello")
        until(terminal, "qvl ocr 1/2 a.png")
        until(terminal, "5 characters")
        status.clear()
        assert terminal.getvalue().endswith("\r\x1b[K")
        status.advance()
        until(terminal, "2/2 ...xxx")
        assert max(map(len, terminal.getvalue().split("\r"))) < 110
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_it_stays_away_from_what_is_read_and_within_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    with Status("ocr", items("a.png", "b.png"), quiet=False) as status:
        status.clear()
        status._draw()
        assert terminal.getvalue() == "\r\x1b[K"
        status.advance()
        assert terminal.getvalue().startswith("\r\x1b[K\r\x1b[Kqvl ocr 2/2 b.png ")
        assert all(len(line.removeprefix("\x1b[K")) < 20 for line in terminal.getvalue().split("\r"))


@pytest.mark.parametrize("stream, quiet", [(io.StringIO(), False), (Terminal(), True)])
def test_pipes_and_quiet_ones_see_nothing(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, quiet: bool) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with Status("ocr", items("a.png"), quiet=quiet) as status:
        status.clear()
        status.advance()
    assert stream.getvalue() == ""


def test_a_remark(capsys: pytest.CaptureFixture[str]) -> None:
    tell("this")
    assert capsys.readouterr() == ("", "qvl: this\n")


def test_it_makes_room_once_for_what_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is cleared again would take the answer with it, which stands in the same terminal."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Status("ocr", items("a.png"), quiet=False) as status:
        write = status.around(terminal.write)
        until(terminal, "a.png")
        write("")
        assert terminal.getvalue().endswith("characters")
        write("OPEN")
        write(" now")
        status.clear()
        assert terminal.getvalue().endswith("\r\x1b[KOPEN now")
