"""Server-sent events: how a stream of chunks goes down one connection, and what ends it early.

Nothing is sent before the first event exists, so that whatever is wrong with a request still gets its own status.
After that an error becomes an event. A client that closes its connection cancels the stream at once. A client that
reads slowly blocks nobody: its own task waits, tokens gather as plain integers (bounded by max_tokens) and the backend
joins them into one delta when the task goes on; a client that reads nothing for `stall_seconds` is cut off.
Where the server offers it ("qvl.body"), events take a short way to the socket: they are many and small.
Knows ASGI. Does not know what the events say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qvl.errors import QvlError
from qvl.server.failures import ClientGone, error_bytes
from qvl.server.http_protocol import DirectBody

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx gathers answers otherwise, and a stream arrives in one piece at its end.
    (b"x-accel-buffering", b"no"),
]


def event(data: bytes) -> bytes:
    """One event; `data` is JSON and so has no line break."""
    return b"data: " + data + b"\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client goes first, `work` is cancelled and `ClientGone` raised.

    To be called when the body has been read: the next message can then only be the disconnect.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `events` (bytes of whole events) as they come, then `[DONE]`.

    `describe` turns an unforeseen exception into what may be told about it.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        stall_seconds: float,
        describe: Callable[[Exception], QvlError],
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._stall_seconds = stall_seconds
        self._describe = describe
        self._stalled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        extension = (scope.get("extensions") or {}).get("qvl.body")
        body = None if extension is None else extension["body"]
        try:
            await while_connected(receive, self._pump(send, body))
        except asyncio.CancelledError:
            if not self._stalled:
                raise
            raise ClientGone from None

    async def _pump(self, send: Send, body: DirectBody | None) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            with _StallGuard(self._stall_seconds, self._cut) as guard:
                write = guard.wrap(send)
                await write({"type": "http.response.start", "status": 200, "headers": HEADERS})
                await write(_piece(first))
                try:
                    async for one in events:
                        if body is None:
                            await write(_piece(one))
                            continue
                        body.write(one)
                        if body.clogged:
                            await guard.watch(body.drain())
                except QvlError as error:
                    await write(_piece(event(error_bytes(error))))
                except Exception as error:  # noqa: BLE001  the border of the process: headers are out, only an event can tell
                    await write(_piece(event(error_bytes(self._describe(error)))))
                await write({"type": "http.response.body", "body": DONE, "more_body": False})

    def _cut(self, task: asyncio.Task[Any]) -> None:
        self._stalled = True
        task.cancel()


def _piece(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


class _StallGuard:
    """Calls `cut` with the task when one write takes longer than `seconds`. One timer per stream, none per write."""

    def __init__(self, seconds: float, cut: Callable[[asyncio.Task[Any]], None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._seconds = seconds
        self._cut = cut
        self._loop = asyncio.get_running_loop()
        self._writing_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> _StallGuard:
        self._look()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def wrap(self, send: Send) -> Send:
        """`send`, watched."""

        async def watched(message: Any) -> None:
            await self.watch(send(message))

        return watched

    async def watch(self, write: Awaitable[None]) -> None:
        """Wait for `write`, at most so long."""
        self._writing_since = self._loop.time()
        await write
        self._writing_since = None

    def _look(self) -> None:
        now = self._loop.time()
        if self._writing_since is not None and now - self._writing_since >= self._seconds:
            self._cut(self._task)
            return
        self._timer = self._loop.call_later(self._seconds / 4, self._look)
