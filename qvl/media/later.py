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


class Decoding:
    """`decode` puts the pixels where they belong, or raises BadMedia, as often as it is tried."""

    kind: MediaKind = "image"

    def __init__(self, decode: Callable[[], None]) -> None:
        self.is_over = False
        self._decode = decode
        self._begun: Future[None] | None = None
        self._lock = threading.Lock()

    def begin(self, gate: threading.Semaphore, start: Callable[[Callable[[], None]], Future[None]]) -> None:
        """Have it done by whoever `start` calls, if nobody has begun."""
        if self._begun is None and not self.is_over:
            self._begun = start(partial(_decode, self, gate))

    def finish(self, gate: threading.Semaphore | None = None) -> None:
        """The pixels are there afterwards. Within a turn at `gate`, if there is one. Raises BadMedia."""
        if self._begun is not None:
            wait((self._begun,))  # whether it could be done or not: perhaps who began was given up
        if not self.is_over:
            _decode(self, gate)

    def do(self) -> None:
        with self._lock:
            if not self.is_over:
                self._decode()
                self.is_over = True


@reported
def _decode(decoding: Decoding, gate: threading.Semaphore | None) -> None:
    with nullcontext() if gate is None else turn(gate):
        decoding.do()
