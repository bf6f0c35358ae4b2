"""HTTP/1.1 as a load generator needs it: a request's bytes out, the answer's pieces handed on as the socket gives them.

A load generator shares its machine with the server it measures, so this is small on purpose: no queues, no task per
request, no copies; httptools parses. Keeps connections open between requests. Ignores proxies. Does not know what
bodies say.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from qvl.errors import InvalidRequest
from qvl.types import check_api_key

# Servers close connections that stay idle, usually after 5 seconds; one that is younger than this can still be trusted.
REUSE_SECONDS = 1.0

Sink = Callable[[bytes], None]


class HttpError(Exception):
    """The connection could not be made, broke, or spoke something else than HTTP."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens; `prefix` stands before "/v1"."""

    scheme: str
    host: str
    port: int
    prefix: str

    @classmethod
    def read(cls, base_url: str) -> Address:
        """The address in `base_url`, with or without "/v1" at its end. Raises `InvalidRequest`."""
        try:
            url = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
            port = url.port
        except ValueError as error:
            raise InvalidRequest(f"'{base_url}' is no address of a server: {error}") from error
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.username:
            raise InvalidRequest(f"'{base_url}' is no address of a server such as http://127.0.0.1:8000")
        prefix = url.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(url.scheme, url.hostname, port or (443 if url.scheme == "https" else 80), prefix)

    def request(self, method: str, path: str, body: bytes = b"", api_key: str | None = None) -> bytes:
        """The bytes of one request for JSON or an event stream. Raises `InvalidRequest` for a key that is no text."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {host}:{self.port}", "Accept: */*"]
        if body:
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        if api_key:
            check_api_key(api_key)
            head.append(f"Authorization: Bearer {api_key}")
        return "\r\n".join([*head, "", ""]).encode() + body


class Connection(asyncio.Protocol):
    """One connection, one request at a time. The parser calls its `on_*` methods."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self.idle_since = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[int] | None = None
        self._sinks: tuple[Sink, Sink] = (_ignore, _ignore)
        self._take: Sink = _ignore
        self._status = 0
        self._has_end = False  # the answer says where it ends; otherwise it ends with the connection

    async def exchange(self, request: bytes, sink: Sink, refused: Sink) -> int:
        """Send a request; its status when its answer is complete. Raises `HttpError`.

        Every piece of the answer's body goes to `sink`, or to `refused` when the status is not 200.
        """
        self._done = asyncio.get_running_loop().create_future()
        self._sinks, self._status = (sink, refused), 0
        self._transport.write(request)
        return await self._done

    @property
    def is_open(self) -> bool:
        return not self._transport.is_closing()

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"the server does not speak HTTP: {error}")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self._status and not self._has_end:
            self.on_message_complete()
        elif self._status:
            self._fail("the server closed the connection in the middle of its answer")
        else:
            self._fail(f"the server closed the connection without an answer{f' ({error})' if error else ''}")

    def on_message_begin(self) -> None:
        self._has_end = False

    def on_header(self, name: bytes, _value: bytes) -> None:
        self._has_end |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._take = self._sinks[self._status != 200]

    def on_body(self, piece: bytes) -> None:
        self._take(piece)

    def on_message_complete(self) -> None:
        if self._status < 200:  # an interim answer: the real one follows
            return
        if not self._parser.should_keep_alive():
            self.close()
        self.idle_since = asyncio.get_running_loop().time()
        if self._done is not None and not self._done.done():
            self._done.set_result(self._status)
        self._status, self._sinks = 0, (_ignore, _ignore)

    def _fail(self, message: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(HttpError(message))


@dataclass(slots=True)
class Pool:
    """The connections to one server. `timeout`: seconds for one whole request."""

    address: Address
    timeout: float
    _idle: list[Connection] = field(default_factory=list)
    _tls: ssl.SSLContext | None = None

    async def exchange(self, request: bytes, sink: Sink, refused: Sink) -> int:
        """As `Connection.exchange`, on a connection that is free or new."""
        try:
            return await asyncio.wait_for(self._exchange(request, sink, refused), self.timeout)
        except (TimeoutError, asyncio.TimeoutError) as error:  # two classes before Python 3.11
            raise HttpError(f"no whole answer within {self.timeout:g} s") from error
        except OSError as error:
            raise HttpError(f"no connection to {self.address.host}:{self.address.port}: {error}") from error

    def close(self) -> None:
        """Close every connection that is not in use."""
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, request: bytes, sink: Sink, refused: Sink) -> int:
        connection = await self._connection()
        try:
            status = await connection.exchange(request, sink, refused)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return status

    async def _connection(self) -> Connection:
        loop = asyncio.get_running_loop()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and loop.time() - connection.idle_since < REUSE_SECONDS:
                return connection
            connection.close()
        if self.address.scheme == "https" and self._tls is None:
            self._tls = ssl.create_default_context()
        _, fresh = await loop.create_connection(Connection, self.address.host, self.address.port, ssl=self._tls)
        return fresh


def _ignore(piece: bytes) -> None:
    """Bytes that nobody asked for."""


async def get(address: Address, path: str, *, api_key: str | None, timeout: float) -> tuple[int, bytes]:
    """Status and body of one GET. Raises `HttpError`."""
    pieces: list[bytes] = []
    with closing(Pool(address, timeout)) as pool:
        status = await pool.exchange(address.request("GET", path, api_key=api_key), pieces.append, pieces.append)
    return status, b"".join(pieces)
