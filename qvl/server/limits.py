"""How much may be in the house at a time: requests, bytes of bodies. Knows counts, not what the requests ask.

Every POST takes a place from its first header to its last byte, so that the number of bodies in memory, of pictures
being decoded and of answers being computed is bounded by the same number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qvl.errors import Overloaded, PayloadTooLarge, Unavailable
from qvl.server.counts import Counts
from qvl.server.failures import ClientGone, error_response
from qvl.server.options import ServerOptions

SECONDS_PER_QUEUED_GUESS = 0.25
MAX_RETRY_AFTER = 30


class Admission:
    """Who may come in. `capacity` is asked each time, as a backend knows its own only after start-up.

    It is one for all processes of a server; `running` are the requests of this process, `counts.all_running` of all.
    """

    def __init__(self, capacity: Callable[[], int], counts: Counts) -> None:
        self._capacity = capacity
        self.counts = counts
        self.draining = False

    @property
    def running(self) -> int:
        return self.counts.running

    @property
    def full(self) -> bool:
        return self.counts.all_running >= self._capacity()

    def refusal(self) -> Unavailable | Overloaded | None:
        """Why a further request would be turned away now; None when it would not."""
        if self.draining:
            return Unavailable("the server is shutting down and takes no new requests")
        if self.full:
            running = self.counts.all_running
            wait = min(MAX_RETRY_AFTER, max(1, round(running * SECONDS_PER_QUEUED_GUESS)))
            message = f"{running} requests are running or waiting, which is all this server takes"
            return Overloaded(message, retry_after=wait)
        return None


class AdmissionMiddleware:
    """A place for every POST, or 429 (full) or 503 (draining) before its body is read."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        refusal = self._admission.refusal()
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
            return
        counts = self._admission.counts
        counts.running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            counts.running -= 1


class BodyLimitMiddleware:
    """Counts bodies while they arrive: 413 above the cap of one, 429 above that of all, a cut for one that stalls."""

    def __init__(self, app: ASGIApp, options: ServerOptions, counts: Counts) -> None:
        self._app = app
        self._options = options
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = _content_length(scope)
        if announced > self._options.max_body_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        counted = _CountedBody(self, receive)
        try:
            await self._app(scope, counted.receive, send)
        finally:
            self._counts.held_bytes -= counted.size

    def take(self, size: int, total: int) -> None:
        """`size` more bytes are held, `total` of them by one request."""
        self._counts.held_bytes += size
        if total > self._options.max_body_bytes:
            raise self._too_large()
        if self._counts.all_held_bytes > self._options.max_total_body_bytes:
            raise Overloaded("too many bytes of request bodies are being read at once", retry_after=1)

    async def next_piece(self, receive: Receive) -> Message:
        """The next message. Raises `ClientGone` when it does not come in time."""
        try:
            return await asyncio.wait_for(receive(), self._options.stall_seconds)
        except asyncio.TimeoutError:
            raise ClientGone from None

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is larger than this server takes ({self._options.max_body_bytes} bytes)")


class _CountedBody:
    """One request's `receive`: counted until the body is complete, untouched after (it then waits for a disconnect)."""

    def __init__(self, limit: BodyLimitMiddleware, receive: Receive) -> None:
        self._limit = limit
        self._receive = receive
        self._complete = False
        self.size = 0

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        message = await self._limit.next_piece(self._receive)
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.size += size
            self._complete = not message.get("more_body", False)
            self._limit.take(size, self.size)
        return message


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
