"""How many requests are under way: as many as the server gains from, fewer as soon as it says that it is too much.

`Limit` is the rule, free of clocks and loops; `Gate` holds tasks back by it. Neither knows what is asked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

GAIN = 0.5  # a step up is kept when it brings half of what it would bring a server with room to spare
ROUND_SECONDS = 0.25  # a rate over less time says little
SURE = 32  # answers that make a rate worth comparing when the question is a fine one
TRIES = 2  # rounds that a step gets: in the first one many answers were still sent before it
REST = 10  # rounds between steps once growth has ended
START = 8
LONGEST_PAUSE = 30.0


@dataclass(slots=True)
class Limit:
    """Grows while throughput grows, doubling at first, and halves when the server is busy (AIMD).

    A step up that brings too little is undone, and tried again later. One that is `fixed` starts at its `ceiling`, only
    gives way to a busy server, and comes back step by step.
    """

    ceiling: int
    fixed: bool = False
    value: int = field(init=False)
    _kept: int = field(init=False)  # the value to go back to when a step brings nothing
    _best: float = 0.0  # answers a second there
    _doubling: bool = True
    _rounds: int = REST
    _answers: int = 0
    _since: float | None = None
    _cut_at: float = float("-inf")

    def __post_init__(self) -> None:
        self.value = self._kept = self.ceiling if self.fixed else min(START, self.ceiling)

    def answered(self, now: float) -> None:
        """An answer has come."""
        if self._since is None:
            self._since, self._answers = now, 0
            return
        self._answers += 1
        seconds = now - self._since
        wanted = self.value if self._doubling else max(SURE, 2 * self.value)
        if self._answers >= wanted and seconds >= ROUND_SECONDS:
            self._end_round(self._answers / seconds)
            self._since, self._answers = now, 0

    def busy(self, sent: float, now: float) -> None:
        """A request that was sent at `sent` was turned away. What was sent before the last cut says nothing new."""
        if sent < self._cut_at:
            return
        self.value = self._kept = max(1, self.value // 2)
        self._cut_at, self._since = now, None
        self._doubling, self._best, self._rounds = False, 0.0, REST

    def _end_round(self, rate: float) -> None:
        self._rounds += 1
        if self.fixed:
            self.value = min(self.ceiling, self.value + max(1, self.value // 8))
        elif self.value == self._kept:
            self._best = rate if self._best == 0 else 0.8 * self._best + 0.2 * rate
            if self._rounds > REST:
                self._step()
        elif rate > self._best * (1 + GAIN * (self.value / self._kept - 1)):
            self._kept, self._best = self.value, rate
            self._step()
        elif self._rounds >= TRIES:
            self.value, self._rounds = self._kept, REST if self._doubling else 0
            self._doubling = False

    def _step(self) -> None:
        step = self.value if self._doubling else max(1, self.value // 4)
        self.value = min(self.ceiling, self.value + step)
        self._rounds = 0


class Gate:
    """Lets `limit.value` tasks through at a time, in the order in which they came, and nobody during a pause."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._paused_until = 0.0
        self._pauses = 0

    async def __aenter__(self) -> None:
        if not self._waiting and self._is_open():
            self.running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def answered(self) -> None:
        """One of those let through has got its answer: call it before leaving."""
        self._pauses = 0
        self.limit.answered(asyncio.get_running_loop().time())

    def busy(self, sent: float, retry_after: float | None) -> None:
        """A request sent at `sent` (the loop's time) was turned away: fewer from now on, and a pause for all.

        Without `retry_after` the pause doubles from half a second while no answer comes.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        if sent >= self._paused_until:  # the first of those that were sent together
            self._pauses += 1
        self.limit.busy(sent, now)
        pause = min(LONGEST_PAUSE, 0.25 * 2 ** min(self._pauses, 10)) if retry_after is None else retry_after
        if now + pause > self._paused_until:
            self._paused_until = now + pause
            loop.call_later(pause + 0.001, self._wake)

    def _is_open(self) -> bool:
        now = asyncio.get_running_loop().time()
        return self.running < self.limit.value and now >= self._paused_until

    def _leave(self) -> None:
        self.running -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._is_open():
            turn = self._waiting.popleft()
            if not turn.done():
                self.running += 1
                turn.set_result(None)
