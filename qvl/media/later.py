"""A picture that is decoded after others know its size: once, also where several requests have it.

Knows who has begun. Does not know files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import nullcontext
from functools import partial

from qvl.media.given_up import turn
from qvl.media.stages import reported
from qvl.types import MediaKind

START_SECONDS = 0.002  # to get going; who begins would keep the interpreter to itself for as long as that


class Decoding:
    """`decode` puts the pixels where they belong, or raises BadMedia, as often as it is tried."""

    kind: MediaKind = "image"

    def __init__(self, decode: Callable[[], None]) -> None:
        self.is_over = False
        self._decode = decode
        self._begun: Future[None] | None = None
        self._started = threading.Event()
        self._tell: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def begin(self, gate: threading.Semaphore, start: Callable[[Callable[[], None]], Future[None]]) -> None:
        """Have it done by whoever `start` calls, if nobody has begun."""
        if self._begun is None and not self.is_over:
            self._begun = start(partial(_decode, self, gate))
            self._started.wait(START_SECONDS)

    def when_over(self, tell: Callable[[], None]) -> None:
        """`tell` is called as soon as the pixels are there, by whoever put them there; perhaps not, if that fails."""
        self._tell.append(tell)
        if self.is_over:
            self._tell_all()

    def finish(self, gate: threading.Semaphore | None = None) -> None:
        """The pixels are there afterwards. Within a turn at `gate`, if there is one. Raises BadMedia."""
        if self._begun is not None:
            wait((self._begun,))  # whether it could be done or not: perhaps who began was given up
        if not self.is_over:
            _decode(self, gate)

    def do(self) -> None:
        with self._lock:
            if not self.is_over:
                self._started.set()
                self._decode()
                self.is_over = True
        self._tell_all()

    def _tell_all(self) -> None:
        tell, self._tell = self._tell, []
        for one in tell:
            one()


@reported
def _decode(decoding: Decoding, gate: threading.Semaphore | None) -> None:
    with nullcontext() if gate is None else turn(gate):
        decoding.do()
