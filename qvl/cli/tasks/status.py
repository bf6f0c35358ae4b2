"""One line on the terminal that says how far the work is; it goes away when there is something to read.

Only a terminal sees it: pipes and logs get remarks and errors alone. Does not know what is done.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from qvl.tasks.inputs import Item

_SECONDS = 0.5  # between two looks at the clock
_WIDE = 60  # characters of a name


def tell(line: str) -> None:
    """A remark, on standard error."""
    print(f"qvl: {line}", file=sys.stderr, flush=True)


class Status:
    """`qvl ocr 3/12 scans/4.png 5s, 812 characters`, kept up by a thread while the block lasts."""

    def __init__(self, name: str, found: Sequence[Item], *, quiet: bool) -> None:
        self._name = name
        self._found = found
        self._shown = not quiet and sys.stderr.isatty()
        self._done = 0
        self._characters = 0
        self._aside = False
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def clear(self) -> None:
        """Make room for something to read; the line stays away until `advance`."""
        if self._shown and not self._aside:
            with self._lock:
                self._aside = True
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()

    def around(self, write: Callable[[str], None]) -> Callable[[str], None]:
        """`write` to the same terminal, with room made as soon as there is something."""

        def written(text: str) -> None:
            if text:
                self.clear()
                write(text)

        return written

    def hear(self, piece: str) -> None:
        """An answer has grown."""
        self._characters += len(piece)

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        self._aside = False
        self._draw()

    def __enter__(self) -> Status:
        if self._shown:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._shown:
            self._thread.join()
        self.clear()

    def _keep(self) -> None:
        while not self._end.wait(_SECONDS):
            self._draw()

    def _draw(self) -> None:
        if not self._shown or self._done >= len(self._found):
            return
        title = self._found[self._done].title
        title = title if len(title) <= _WIDE else f"...{title[3 - _WIDE :]}"
        told = f"{int(time.monotonic() - self._began)}s, {self._characters} characters"
        line = f"qvl {self._name} {self._done + 1}/{len(self._found)} {title} {told}"
        with self._lock:
            if not self._aside:
                sys.stderr.write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}")
                sys.stderr.flush()
