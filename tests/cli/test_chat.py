"""`qvl chat` against the echo server: piped, and typed into a real terminal (a pty)."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from qvl.backends.echo import EchoBackend
from qvl.cli.screen import Page, PlainScreen, split_blocks
from qvl.cli.spoken import Order, Words, read_line
from qvl.cli.talk import Session, Settings
from qvl.cli.voice import Voice
from qvl.client import collect
from qvl.errors import InvalidRequest
from qvl.memory import Store
from qvl.types import Delta
from tests.server.live import Live, live

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("/image", "/video", "/undo", "/quit", "/help")
CSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red dot.png"
    Image.new("RGB", (40, 40), "red").save(path)
    return path


def environment(home: Path) -> dict[str, str]:
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("QVL_", "COLUMNS", "LINES"))}
    return {**mine, "QVL_HOME": str(home), "TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"}


def command(url: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "qvl", "chat", "--base-url", url, *flags]


def piped(lines: str, home: Path, url: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(url, *flags), cwd=ROOT, env=environment(home), input=lines, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


class Person:
    """Someone at a terminal: types, and waits until something can be read."""

    def __init__(self, keyboard: int, process: subprocess.Popen[bytes]) -> None:
        self._keyboard = keyboard
        self.process = process
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def sees(self, pattern: str, seconds: float = 120.0) -> str:
        """Wait until `pattern` shows in what came since the last time; returns what came."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} never showed in {self.seen!r}"
            if select.select([self._keyboard], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._keyboard, 65536).decode(errors="replace")
                    self.seen = CSI.sub("", self.seen)  # of all: a sequence may come in two pieces
                except OSError:  # Linux says so when the other side has closed
                    assert re.search(pattern, self.seen), f"{pattern!r} never showed in {self.seen!r}"
        told, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return told

    def interrupts(self, pattern: str) -> None:
        """Ctrl-C at the prompt, again if need be: CPython loses one that arrives just before it waits for a key."""
        for _ in range(8):
            self.type("\x03")
            try:
                self.sees(pattern, seconds=15.0)
            except AssertionError:
                continue
            return
        self.sees(pattern, seconds=0.0)

    def leaves(self) -> int:
        self.type("\x04")
        return self.process.wait(120)


@contextmanager
def person(home: Path, url: str, *flags: str) -> Iterator[Person]:
    keyboard, screen = pty.openpty()
    process = subprocess.Popen(
        command(url, *flags), cwd=ROOT, env=environment(home), stdin=screen, stdout=screen, stderr=screen,
        start_new_session=True, preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(screen)
    try:
        someone = Person(keyboard, process)
        someone.sees("/help lists")
        someone.sees("> $")  # what is typed before a prompt is shown twice: by the terminal, then in the line
        yield someone
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes a signal


def turns(home: Path) -> list[tuple[str, str | None]]:
    """(role, finish_reason) of the newest conversation."""
    with Store(home / "conversations.db") as store:
        return [(turn.message.role, turn.finish_reason) for turn in store.turns(store.find("last"))]


def test_piped_lines_are_turns_and_answers_are_plain(server: Live, home: Path, picture: Path) -> None:
    done = piped(f"one **two**\n\n{picture}\nWhat?\n'{picture}' And this?\n", home, server.url, "--system", "Be brief.")
    assert (done.stdout, done.returncode) == ("one **two**\nWhat? [1 image]\nAnd this? [2 images]\n", 0), done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert [role for role, _ in turns(home)] == ["system", *["user", "assistant"] * 3]


def test_commands_when_piped(server: Live, home: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "talk.md", tmp_path / "talk.json"
    done = piped(f"first\nsecond\n/undo\n/tokens\n/save {page}\n/save {data}\n/quit\nnever\n", home, server.url)
    assert done.stdout == "first\nsecond\n"
    assert "the whole conversation: 10 tokens" in done.stderr
    assert "first" in page.read_text()
    assert [turn["parts"][0]["text"] for turn in json.loads(data.read_text())["turns"]] == ["first", "first"]
    again = piped(f"/resume\nthird\n/save {page}\n", home, server.url, "--resume", "last")
    assert (again.stdout, again.returncode) == ("third\n", 2)
    assert "2 turns  first" in again.stderr
    assert "is there already" in again.stderr
    assert len(turns(home)) == 4


def test_a_turn_taken_back_leaves_nothing_to_ask_again_or_to_resume(server: Live, home: Path) -> None:
    done = piped("first\n/undo\n/resume\n/retry\n", home, server.url)
    assert (done.stdout, done.returncode) == ("first\n", 2)
    assert "turns" not in done.stderr
    assert "nothing has been asked yet" in done.stderr


def test_what_was_said_is_found_and_forgotten_when_piped(server: Live, home: Path, picture: Path) -> None:
    piped(f"{picture}\nwhere are the Apples\n", home, server.url)
    done = piped("pears\n/search apples\n/search nuts\n/forget last\n/resume\n", home, server.url)
    assert (done.stdout, done.returncode) == ("pears\n", 0), done.stderr
    assert "user: where are the Apples" in done.stderr
    assert "nothing was found" in done.stderr
    assert "forgotten: 2 turns, 0 pictures" in done.stderr
    assert "a new conversation" in done.stderr
    with Store(home / "conversations.db") as store:
        (info,) = store.conversations()
        left = piped(f"/forget {info.id[:6]}\n", home, server.url)
        assert "forgotten: 2 turns, 1 picture or video\n" in left.stderr
        assert store.conversations() == []
    for order in ("/forget", "/search", "/forget nothing"):
        assert piped(f"{order}\n", home, server.url).returncode == 2


def test_mistakes_when_piped_end_it_with_a_line_and_a_code(server: Live, home: Path) -> None:
    for lines, said in (("/imge x\nhi\n", "did you mean '/image'?"), ("/image nowhere.png\n", "no such file")):
        done = piped(lines, home, server.url)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
    unreachable = piped("hi\n", home, "http://127.0.0.1:9")
    assert unreachable.returncode == 1
    assert "qvl serve" in unreachable.stderr
    assert piped("hi\n", home, server.url, "--resume", "nothing").returncode == 2


def test_typed_into_a_terminal(server: Live, home: Path, picture: Path) -> None:
    with person(home, server.url) as someone:
        someone.type(f"/image {picture}\r")
        someone.sees(r"\[image: red dot.png\]")
        someone.type("Is it **bold**?\r")
        answer = someone.sees(r"Is it bold\? \[1 image\]")
        assert "**" not in answer.partition("?\r\n")[2].rsplit("Is it bold", 1)[1]
        someone.type("/imge x\r")
        someone.sees("did you mean '/image'")
        someone.type("/undo\r")
        someone.sees("taken back")
        someone.type("/help\r")
        someone.sees("/resume ")
        someone.type("hello\r")
        someone.sees("hello\r\n(.|\n)*hello")
        someone.sees("> $")
        someone.interrupts("Ctrl-D or /quit leaves")
        someone.sees("> $")
        assert someone.leaves() == 0
    assert len(turns(home)) == 2
    history = home / "chat_history"
    assert "/undo" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(home: Path) -> None:
    with live(EchoBackend("slow", seconds_per_token=0.2)) as slow, person(home, slow.url) as someone:
        someone.type("x" * 400 + "\r")
        someone.sees("x{400}")
        slow.wait_metric("qvl_engine_running", 1)
        someone.sees("x{10}")
        someone.type("\x03")
        someone.sees(r"\(stopped\)")
        slow.wait_metric("qvl_engine_aborted_total", 1)
        assert turns(home) == [("user", None), ("assistant", "abort")]
        someone.type("go on\r")
        someone.sees("go on\r\n(.|\n)*go on")
        someone.sees("> $")
        assert someone.leaves() == 0
    assert [role for role, _ in turns(home)] == ["user", "assistant"] * 2


class Interrupted(PlainScreen):
    """A terminal at which Ctrl-C is pressed while a piece of the answer is drawn."""

    interactive = True

    def __init__(self) -> None:
        self.lines = ["hello", "/quit"]
        self.said: list[str] = []

    def line(self) -> str:
        return self.lines.pop(0)

    def say(self, text: str) -> None:
        self.said.append(text)

    def show(self, texts: Iterable[str]) -> None:
        for _ in texts:
            raise KeyboardInterrupt


def test_ctrl_c_while_an_answer_is_drawn_keeps_what_was_said(home: Path) -> None:
    def stream(messages: object, sampling: object) -> Iterator[Delta]:
        yield Delta(0, "half an ")
        yield Delta(0, "answer", finish_reason="stop")

    voice = Voice("m", "here", 1000, lambda *_: collect(stream(*_)), stream, lambda messages: 10)
    screen = Interrupted()
    with Store(home / "conversations.db") as store:
        Session(store, voice, Settings(), screen).run()
    assert screen.said[-1] == "(stopped)"
    assert turns(home) == [("user", None), ("assistant", "abort")]


def test_ctrl_c_before_the_first_word_leaves_a_question_to_retry(home: Path) -> None:
    with live(EchoBackend("mute", seconds_per_token=600)) as slow, person(home, slow.url) as someone:
        someone.type("abc\r")
        slow.wait_metric("qvl_engine_running", 1)
        someone.type("\x03")
        someone.sees("/retry asks again")
        assert turns(home) == [("user", None)]
        someone.type("/undo\r")
        someone.sees("taken back")
        someone.process.send_signal(signal.SIGTERM)
        assert someone.process.wait(120) != 0


def test_what_a_line_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "my photo.JPG", "it's.png", "clip.mp4", "notes.txt"):
        (tmp_path / name).touch()

    def media(line: str) -> tuple[str, list[tuple[str, str]]]:
        words = read_line(line, COMMANDS)
        assert isinstance(words, Words)
        return words.text, [(one.kind, getattr(one.source, "name", one.source)) for one in words.media]

    assert read_line("/image  a.png ", COMMANDS) == Order("/image", "a.png")
    assert media("hello there") == ("hello there", [])
    assert media("a.png") == ("", [("image", "a.png")])
    assert media("my photo.JPG") == ("", [("image", "my photo.JPG")])
    assert media("my\\ photo.JPG what?") == ("what?", [("image", "my photo.JPG")])
    assert media("'my photo.JPG' a.png which?") == ("which?", [("image", "my photo.JPG"), ("image", "a.png")])
    assert media("what's in a.png") == ("what's in", [("image", "a.png")])
    assert media("it's.png") == ("", [("image", "it's.png")])
    assert media(f"file://{tmp_path}/my%20photo.JPG") == ("", [("image", "my photo.JPG")])
    assert media(f"{tmp_path}/clip.mp4 what happens?") == ("what happens?", [("video", "clip.mp4")])
    assert media("see https://host/p.jpg?x=1") == ("see", [("image", "https://host/p.jpg?x=1")])
    assert media("https://host/page read notes.txt") == ("https://host/page read notes.txt", [])
    assert media('missing.png it\'s "so"') == ('missing.png it\'s "so"', [])
    assert media('say "hello  world"') == ('say "hello  world"', [])
    assert media("/usr/bin is a folder") == ("/usr/bin is a folder", [])
    with pytest.raises(InvalidRequest, match="did you mean '/undo'"):
        read_line("/undoo", COMMANDS)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("one", "one"),
        ("one\n\ntwo", "two"),
        ("one\n \n\n", ""),
        ("```\na\n\nb", "```\na\n\nb"),
        ("x\n\n```py\na\n\nb\n```\n\nc", "c"),
        ("````\n```\n\nb", "````\n```\n\nb"),
    ],
)
def test_blocks_that_are_finished(text: str, rest: str) -> None:
    assert split_blocks(text) == (text[: len(text) - len(rest)], rest)


def test_markdown_keeps_lines_and_tags() -> None:
    console = Console(width=40, force_terminal=True, color_system="truecolor")
    with console.capture() as captured:
        console.print(Page("ROOM 204\nsecond floor <b>x</b>\n\n```python\nimport os\n```"))
    lines = [line.rstrip() for line in CSI.sub("", captured.get()).splitlines()]
    assert lines[:2] == ["ROOM 204", "second floor <b>x</b>"]
    assert lines[-1] == " import os", "no empty lines around the whole"
    assert re.search("\x1b\\[[0-9;]+m.*import", captured.get())
