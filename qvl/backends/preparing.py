"""A request that is prepared in a thread: known as soon as the engine can be told of it, over when it is complete.

Knows who must hear of a failure, and what to throw away when whoever asked went first. Does not know what is prepared.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Generic, TypeAlias, TypeVar

from qvl.media.given_up import given_up_by

T = TypeVar("T")
Work: TypeAlias = Callable[[Callable[[T], None]], T]


class Preparing(Generic[T]):
    """`work` runs in `pool`. It may announce what it will return; `throw_away` gets that if it was never `used`.

    All but `work` happens on the loop.
    """

    def __init__(self, pool: Executor, work: Work[T], throw_away: Callable[[T], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._throw_away = throw_away
        self._known: asyncio.Future[T] = self._loop.create_future()
        self._left = threading.Event()
        self._made: list[T] = []
        self._over = self._used = False
        self._fail: Callable[[BaseException], None] | None = None
        self._error: BaseException | None = None
        pool.submit(self._run, work).add_done_callback(lambda done: self._on_loop(self._end, done))

    async def known(self) -> T:
        """What was announced or returned. Raises what `work` raised before."""
        return await self._known

    def used(self, fail: Callable[[BaseException], None]) -> None:
        """It went to the engine: `fail` is called if `work` fails yet, or has since it was announced."""
        self._used = True
        self._fail = fail
        if self._error is not None:
            fail(self._error)

    def leave(self) -> None:
        """Nobody waits any more. Safe to call at any time."""
        self._left.set()
        self._fail = None
        self._known.cancel()
        self._clear()

    def _run(self, work: Work[T]) -> T:
        with given_up_by(self._left):
            return work(lambda made: self._on_loop(self._announced, made))

    def _on_loop(self, act: Callable[..., None], argument: object) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(act, argument)

    def _announced(self, made: T) -> None:
        self._made = [made]
        if not self._known.done():
            self._known.set_result(made)

    def _end(self, done: Future[T]) -> None:
        self._over = True
        self._error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if self._error is None:
            self._announced(done.result())
        elif not self._known.done():
            self._known.set_exception(self._error)
        elif self._fail is not None:
            self._fail(self._error)
        self._clear()

    def _clear(self) -> None:
        if self._over and self._left.is_set() and not self._used and self._made:
            self._throw_away(self._made.pop())
