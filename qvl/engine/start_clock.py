"""What the time of a start went to: one line of the log. Knows no engine."""

from __future__ import annotations

import time


class StartClock:
    """Runs from when it is made; `passed` names what was done since the last time."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._parts: list[tuple[str, float]] = []

    def passed(self, part: str) -> None:
        now = time.monotonic()
        self._parts.append((part, now - self._last))
        self._last = now

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def __str__(self) -> str:
        """ "6.3 s: imports 2.5, device 0.4, ..." """
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in self._parts)
        return f"{self._last - self._began:.2f} s: {parts}"
