"""Requests that offer another protocol are heard as if they did not, however they are cut and whatever follows."""

from __future__ import annotations

import random
import re
import socket

import httptools
import pytest

from qvl.server.http_parser import RequestParser
from tests.server.live import Live
from tests.server.test_limits import HELLO, dial, request_bytes

OFFER = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
LENGTH = b"POST /a?b HTTP/1.1\r\nHost: x\r\n%bContent-Length: 11\r\n\r\nhello world"
CHUNKED = b"POST /c HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
BARE = b"GET /g HTTP/1.1\r\n%bHost: x\r\n\r\n"
Told = tuple[bytes, bytes, list[tuple[bytes, bytes]], bytes]


class Hearer:
    """What was heard: method, URL, headers other than the offer's, and body of each message."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.headers: list[tuple[bytes, bytes]] = []
        self.parser = RequestParser(self)

    def on_message_begin(self) -> None:
        self.url = self.body = b""
        self.headers = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.method = self.parser.get_method()
        assert (self.parser.should_upgrade(), self.parser.should_keep_alive()) == (False, True)
        assert self.parser.get_http_version() == "1.1"

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if self.parser.leaves_body:
            return
        plain = [field for field in self.headers if field[0] not in (b"connection", b"upgrade", b"http2-settings")]
        self.told.append((self.method, self.url, plain, self.body))


def heard(data: bytes, cuts: list[int]) -> list[Told]:
    hearer = Hearer()
    for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
        hearer.parser.feed_data(data[start:stop])
    return hearer.told


@pytest.mark.parametrize(
    "offer", [OFFER, "Connection: Upgrade\r\nUpgrade: websocket\r\n", "connection: UPGRADE\r\nupgrade: x\r\n"]
)
def test_an_offer_changes_nothing(offer: str) -> None:
    messages = [LENGTH, BARE, CHUNKED, LENGTH, CHUNKED, BARE]
    plain = b"".join(message % b"" for message in messages)
    expected = heard(plain, [])
    assert [told[3] for told in expected] == [b"hello world" if m is not BARE else b"" for m in messages]
    draw = random.Random(3)
    for _ in range(60):
        offered = b"".join(message % (offer.encode() if draw.random() < 0.6 else b"") for message in messages)
        cuts = sorted(draw.sample(range(1, len(offered)), draw.choice([0, 1, 2, 9, 100])))
        assert heard(offered, cuts) == expected
    assert heard(offered, list(range(1, len(offered)))) == expected


def test_as_many_as_come_at_once() -> None:
    assert len(heard(BARE % OFFER.encode() * 3000, [])) == 3000


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nno size\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"\r\n\x16\x03\x01",
    ],
)
def test_what_is_wrong_stays_wrong(rest: bytes) -> None:
    with pytest.raises(httptools.HttpParserError):
        heard(b"POST / HTTP/1.1\r\n" + OFFER.encode() + rest, [])


def test_a_client_of_java(server: Live) -> None:
    """The body in a piece of its own, as it is sent, and one request after another on the connection."""
    whole = request_bytes(HELLO, headers=OFFER)
    head, body = whole[: whole.index(b"\r\n\r\n") + 4], whole[whole.index(b"\r\n\r\n") + 4 :]
    with dial(server) as sock:
        for pieces in ([whole], [head, body], [head + body[:5], body[5:]], [request_bytes(HELLO)]):
            for piece in pieces:
                sock.sendall(piece)
            assert _answer(sock).startswith(b"HTTP/1.1 200 ")


def _answer(sock: socket.socket) -> bytes:
    """One answer with its whole body."""
    data = b""
    while not (found := re.search(rb"content-length: (\d+)[^\n]*\r\n(?:[^\n]+\n)*?\r\n", data)) or (
        len(data) < found.end() + int(found[1])
    ):
        piece = sock.recv(65536)
        assert piece, data
        data += piece
    return data
