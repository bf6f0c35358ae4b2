"""The terminal of `qvl chat`: lines in with history, answers out as Markdown while they grow; plain where piped.

Knows terminals. Does not know models or conversations.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

if TYPE_CHECKING:
    from markdown_it.token import Token

HISTORY_LINES = 1000
SECONDS_PER_DRAWING = 1 / 12
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})", re.MULTILINE)
# A model's answer may hold anything; what steers a terminal stays out of it. Line feeds and tabs are text.
_STEERING = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class Screen(Protocol):
    """Where lines come from and answers go to."""

    interactive: bool

    def line(self) -> str:
        """The next line. Raises EOFError at the end, KeyboardInterrupt when it is given up."""

    def say(self, text: str) -> None:
        """A remark of the program itself."""

    def complain(self, text: str) -> None:
        """What went wrong."""

    def show(self, texts: Iterable[str]) -> None:
        """An answer, piece by piece; what was shown stays when the pieces break off."""


class PlainScreen:
    """Lines from a pipe, answers as they are; remarks go to stderr."""

    interactive = False

    def line(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def complain(self, text: str) -> None:
        print(f"qvl: {text}", file=sys.stderr)

    def show(self, texts: Iterable[str]) -> None:
        ended = False
        for text in texts:
            sys.stdout.write(text)
            sys.stdout.flush()
            ended = text.endswith("\n") if text else ended
        if not ended:
            print(flush=True)


class Terminal:
    """A person's terminal. `commands` are completed by Tab, file names after them; `history` is kept between runs."""

    interactive = True

    def __init__(self, history: Path, commands: Sequence[str]) -> None:
        self._console = Console(highlight=False)
        self._history = history
        self._readline = _with_readline(history, commands)

    def line(self) -> str:
        line = input("\001\033[1;36m\002> \001\033[0m\002" if self._readline and self._console.is_terminal else "> ")
        self._keep_history()
        return line

    def say(self, text: str) -> None:
        self._console.print(text.translate(_STEERING), style="dim", markup=False)

    def complain(self, text: str) -> None:
        self._console.print(text.translate(_STEERING), style="red", markup=False)

    def show(self, texts: Iterable[str]) -> None:
        """Whole blocks are printed for good; only the block that still grows is drawn again.

        Drawn from this thread alone: rich's own refreshing thread now and then erases lines above when it is late.
        """
        rest, shown, drawn = "", False, 0.0
        with _no_echo(), Live(console=self._console, transient=True, auto_refresh=False) as growing:
            try:
                for text in texts:
                    done, rest = split_blocks(rest + text.translate(_STEERING))
                    if done.strip():
                        growing.update("")
                        self._print_block(done, shown)
                        shown = True
                    if time.monotonic() - drawn > SECONDS_PER_DRAWING:
                        growing.update(Page(rest), refresh=True)
                        drawn = time.monotonic()
            finally:
                growing.update("", refresh=True)
                if rest.strip():
                    self._print_block(rest, shown)

    def _print_block(self, text: str, follows: bool) -> None:
        if follows:
            self._console.print()
        self._console.print(Page(text))

    def _keep_history(self) -> None:
        if self._readline is not None:
            with contextlib.suppress(OSError):  # a history that cannot be kept is no reason to stop talking
                self._readline(self._history)


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """What is typed ahead waits for the next prompt instead of landing in an answer. Ctrl-C still works."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(keyboard, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def split_blocks(text: str) -> tuple[str, str]:
    """`text` cut at its last blank line outside a code block: what will not change any more, and what may."""
    cut = 0
    for match in re.finditer(r"\n[ \t]*\n+", text):
        if not _inside_code(text[: match.end()]):
            cut = match.end()
    return text[:cut], text[cut:]


def _inside_code(text: str) -> bool:
    fence = ""
    for match in _FENCE.finditer(text):
        mark = match.group(1)
        if not fence:
            fence = mark
        elif mark[0] == fence[0] and len(mark) >= len(fence):
            fence = ""
    return bool(fence)


class Page:
    """Markdown for the terminal: lines stay lines (what was read off a picture has them), tags stay text.

    Without the empty lines that rich puts around tables and code: those between blocks are set when they are printed.
    """

    def __init__(self, text: str) -> None:
        self._page = Markdown("", code_theme="ansi_dark")
        parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self._page.parsed = parser.parse(text)
        for token in self._page.parsed:
            _keep_lines(token)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        lines = console.render_lines(self._page, options, pad=False)
        full = [number for number, line in enumerate(lines) if any(part.text.strip() for part in line)]
        for line in lines[full[0] : full[-1] + 1] if full else []:
            yield from line
            yield Segment.line()


def _keep_lines(token: Token) -> None:
    for child in token.children or ():
        if child.type == "softbreak":
            child.type = "hardbreak"


def _with_readline(history: Path, commands: Sequence[str]) -> Callable[[Path], None] | None:
    """Line editing where Python has it; returns what writes the history, readable by its owner only."""
    try:
        import readline
    except ImportError:
        return None

    def complete(text: str, state: int) -> str | None:
        begins = readline.get_line_buffer().lstrip() == text
        found = [word + " " for word in commands if begins and word.startswith(text)] or _files(text)
        return found[state] if state < len(found) else None

    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(HISTORY_LINES)
    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        readline.write_history_file(path)

    return write


def _files(beginning: str) -> list[str]:
    folder, name = os.path.split(os.path.expanduser(beginning))
    try:
        entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    return [
        os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry.name.startswith(name)
    ]
