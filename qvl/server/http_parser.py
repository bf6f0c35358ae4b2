"""httptools' parser for requests that offer another protocol, an offer that HTTP lets a server pass over.

Java's own client offers HTTP/2 (`Upgrade: h2c`) with its requests over plain HTTP. httptools takes an offer for an
agreement: it ends such a message after its head, and what follows is nobody's. Here a second parser, told where the
body ends, goes on from there with the body and with all later messages.
Knows the parser's events. Does not know requests or sockets.
"""

from __future__ import annotations

from typing import Protocol

import httptools

_FRAMING = (b"content-length", b"transfer-encoding")


class Hearer(Protocol):
    """Who hears what is parsed; `headers` are those of the last head, their names in small letters."""

    headers: list[tuple[bytes, bytes]]

    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_body(self, body: bytes) -> None: ...
    def on_message_complete(self) -> None: ...


class RequestParser:
    """What uvicorn uses of `httptools.HttpRequestParser`.

    `leaves_body`: the message is told as complete, and is not; it will be told again.
    """

    def __init__(self, hearer: Hearer) -> None:
        self._hearer = hearer
        self._parser = _parser(hearer)

    def feed_data(self, data: bytes) -> None:
        """Raises `httptools.HttpParserError`."""
        rest = memoryview(data)
        while True:
            try:
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                rest = rest[offer.args[0] :]
            framing = b"".join(b"%b: %b\r\n" % field for field in self._hearer.headers if field[0] in _FRAMING)
            self._parser = _parser(_Rest(self._hearer))
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % framing)

    @property
    def leaves_body(self) -> bool:
        return self._parser.should_upgrade()

    def should_upgrade(self) -> bool:
        return False

    def should_keep_alive(self) -> bool:
        return self._parser.should_keep_alive()

    def get_http_version(self) -> str:
        return self._parser.get_http_version()

    def get_method(self) -> bytes:
        return self._parser.get_method()


class _Rest:
    """Passes on all but the first head, which was heard before."""

    def __init__(self, hearer: Hearer) -> None:
        self._hearer = hearer
        self._in_known_head = True
        self.on_body = hearer.on_body
        self.on_message_complete = hearer.on_message_complete

    def on_message_begin(self) -> None:
        if not self._in_known_head:
            self._hearer.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._in_known_head:
            self._hearer.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_known_head:
            self._hearer.on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._in_known_head:
            self._hearer.on_headers_complete()
        self._in_known_head = False


def _parser(hearer: Hearer | _Rest) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(hearer)
    # As uvicorn has it: what comes after a message that closes the connection is no error.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser
