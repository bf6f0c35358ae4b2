"""The socket's side of the server: uvicorn's httptools protocol with a cap and a time limit on headers.

Knows bytes of a request's head, and a short way for streamed bodies. All else is uvicorn's and the app's.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from qvl.server.http_parser import RequestParser
from qvl.server.options import ServerOptions

_CLOSING = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"


class _HeadTooLarge(Exception):
    """Stops the parser in the middle of its work; it becomes a 431."""


class DirectBody:
    """The body of one answer without the layers between app and socket, for answers of very many small pieces.

    The answer's start has gone through the layers, its end will; in between pieces are framed and handed to the
    transport, which writes them when the loop comes round.
    """

    def __init__(self, cycle: RequestResponseCycle, transport: asyncio.Transport) -> None:
        self._cycle = cycle
        self._transport = transport

    @property
    def clogged(self) -> bool:
        """Whether so much is unsent that the client should read first: see `drain`."""
        return self._cycle.flow.write_paused

    async def drain(self) -> None:
        await self._cycle.flow.drain()

    def write(self, piece: bytes) -> None:
        """One chunk; nothing where the client has gone."""
        if not self._cycle.disconnected:
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))


class CappedProtocol(HttpToolsProtocol):
    """431 when a request's line and headers exceed `max_header_bytes`, 408 when they take longer than `header_seconds`.

    Subclasses made by `http_protocol` fill in the two limits. The app finds `transport.abort` as extension "qvl.abort"
    and a `DirectBody` as extension "qvl.body".
    """

    max_header_bytes: int
    header_seconds: float

    _in_head = False
    _head_bytes = 0
    _heads_begun = 0
    _head_timer: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.parser = RequestParser(self)  # type: ignore[assignment]
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        continued = self._in_head
        between = self.cycle is None or not self.cycle.more_body
        self._heads_begun = 0
        super().data_received(data)
        # Bytes of a head that is not complete yet. A piece in which it began after an older request's end is left out:
        # it is one read of the socket at most, and a complete head is counted exactly.
        if self._in_head and (continued or (between and self._heads_begun == 1)):
            self._head_bytes += len(data)
            if self._head_bytes > self.max_header_bytes:
                self._refuse(431, "headers_too_large", "the request's headers are larger than this server takes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"qvl.abort": {"call": self.transport.abort}}
        self._in_head = True
        self._heads_begun += 1
        self._head_bytes = 0
        if self._head_timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self.max_header_bytes:
            raise _HeadTooLarge
        super().on_headers_complete()
        # The app's task has been made for this very cycle, and does not run before the loop comes round.
        self.scope["extensions"]["qvl.body"] = {"body": DirectBody(self.cycle, self.transport)}

    def on_message_complete(self) -> None:
        if not self.parser.leaves_body:  # type: ignore[attr-defined]
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this when the parser gave up, also on our own `_HeadTooLarge`."""
        if self._head_complete_but_too_large():
            self._refuse(431, "headers_too_large", "the request's headers are larger than this server takes")
        else:
            self._refuse(400, "bad_http", "this is not a valid HTTP request")

    def _head_complete_but_too_large(self) -> bool:
        headers = self.headers or []
        size = len(getattr(self, "url", b"")) + sum(len(name) + len(value) + 4 for name, value in headers)
        return size > self.max_header_bytes

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._refused = True
        self._stop_timer()
        body = b'{"error":{"message":"%s","type":"invalid_request_error","param":null,"code":"%s"}}'
        filled = body % (message.encode(), code.encode())
        self.transport.write(b"HTTP/1.1 %d \r\n" % status + _CLOSING % (len(filled), filled))
        self.transport.close()

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.header_seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self._refuse(408, "request_timeout", "the request's headers did not arrive in time")


def http_protocol(options: ServerOptions) -> type[Any]:
    """The protocol class with these limits, for `uvicorn.Config(http=...)`."""
    limits = {"max_header_bytes": options.max_header_bytes, "header_seconds": options.header_seconds}
    return type("QvlProtocol", (CappedProtocol,), limits)
