"""The load generator's HTTP: every framing of an answer, however the network cuts it, and servers that misbehave."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile

import pytest

from qvl.bench.load.answer import Outcome
from qvl.bench.load.http import Address, HttpError, Pool, get
from qvl.bench.load.worker import Target, ask, closed_loop
from qvl.errors import InvalidRequest

EVENTS = (
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"caf\xc3\xa9 "}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"\xe5\xa5\xbd"},"finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
    b"data: [DONE]\n\n"
)
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def chunked(body: bytes, size: int = 50) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


CHUNKED = STREAM + b"transfer-encoding: chunked\r\n\r\n" + chunked(EVENTS)
SIZED = STREAM + b"content-length: %d\r\n\r\n" % len(EVENTS) + EVENTS
UNTIL_CLOSE = STREAM + b"\r\n" + EVENTS


READER = "reads what a client sends"


@pytest.fixture(scope="module", autouse=True)
def nobody_reads_on() -> Iterator[None]:
    """A thread that read on behind its client's end would take a core and memory without bound from all later tests."""
    yield
    for thread in [thread for thread in threading.enumerate() if thread.name == READER]:
        thread.join(10)
        assert not thread.is_alive()


@dataclass
class Scripted:
    """A server that answers every request with the same pieces, one write each, then closes or waits for more."""

    pieces: Sequence[bytes]
    close: bool = False
    pause: float = 0.0
    speaks_first: bool = False
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    port: int = 0

    @property
    def target(self) -> Target:
        return Target(Address("http", "127.0.0.1", self.port, ""), "m", timeout=120.0)

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._answer, args=(connection,), name=READER, daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as reader:
            if self.speaks_first:
                connection.sendall(self.pieces[0])
                return
            while head := b"".join(takewhile(b"\r\n".__ne__, reader)):
                length = next((int(v) for k, _, v in map(_header, head.splitlines()) if k == b"content-length"), 0)
                self.requests.append(head + b"\r\n" + reader.read(length))
                for piece in self.pieces:
                    connection.sendall(piece)
                    time.sleep(self.pause)
                if self.close:
                    return


def _header(line: bytes) -> tuple[bytes, bytes, bytes]:
    name, colon, value = line.partition(b":")
    return name.strip().lower(), colon, value.strip()


@contextmanager
def scripted(*pieces: bytes, close: bool = False, pause: float = 0.0, speaks_first: bool = False) -> Iterator[Scripted]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Scripted(pieces, close, pause, speaks_first, port=listener.getsockname()[1])
        threading.Thread(target=server.serve, args=(listener,), daemon=True).start()
        yield server
        listener.shutdown(socket.SHUT_RDWR)


async def ask_once(target: Target) -> Outcome:
    pool = Pool(target.address, target.timeout)
    try:
        return await ask(pool, target, b"{}")
    finally:
        pool.close()


def good(outcome: Outcome) -> bool:
    assert outcome.error == ""
    assert outcome.start <= outcome.first <= outcome.last
    return (outcome.prompt_tokens, outcome.output_tokens, outcome.chunks, len(outcome.gaps)) == (7, 3, 2, 1)


@pytest.mark.parametrize(
    ("answer", "close"),
    [(CHUNKED, False), (SIZED, False), (UNTIL_CLOSE, True)],
    ids=["chunked", "sized", "until close"],
)
async def test_every_framing(answer: bytes, close: bool) -> None:
    with scripted(answer, close=close) as server:
        assert good(await ask_once(server.target))


async def test_an_answer_that_comes_byte_by_byte() -> None:
    """Every border of a read falls everywhere: into the head, into sizes of chunks, into lines and characters."""
    with scripted(*(bytes([byte]) for byte in CHUNKED), pause=1e-4) as server:
        assert good(await ask_once(server.target))


async def test_an_interim_answer_is_not_the_answer() -> None:
    with scripted(b"HTTP/1.1 102 Processing\r\n\r\n", CHUNKED, pause=0.01) as server:
        assert good(await ask_once(server.target))


async def test_what_is_sent() -> None:
    with scripted(SIZED) as server:
        body = '{"text": "é"}'.encode()
        target = Target(Address("http", "127.0.0.1", server.port, "/api"), "m", api_key="secret")
        pool = Pool(target.address, 20.0)
        assert good(await ask(pool, target, body))
        pool.close()
        head, _, sent = server.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /api/v1/chat/completions HTTP/1.1"
    assert f"Host: 127.0.0.1:{server.port}" in lines
    assert f"Content-Length: {len(body)}" in lines
    assert "Authorization: Bearer secret" in lines
    assert sent == body


@pytest.mark.parametrize("answer", [CHUNKED, SIZED], ids=["chunked", "sized"])
async def test_connections_are_used_again(answer: bytes) -> None:
    with scripted(answer) as server:
        outcomes = await closed_loop(server.target, [b"{}"] * 7, 2)
        assert [good(outcome) for outcome in outcomes] == [True] * 7
        assert server.connections == 2


async def test_a_connection_that_the_server_gives_up_is_not_used_again() -> None:
    answer = SIZED.replace(b"\r\n", b"\r\nconnection: close\r\n", 1)
    with scripted(answer, close=True) as server:
        assert [good(outcome) for outcome in await closed_loop(server.target, [b"{}"] * 3, 1)] == [True] * 3
        assert server.connections == 3


async def test_an_old_idle_connection_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl.bench.load.http.REUSE_SECONDS", 0.0)
    with scripted(SIZED) as server:
        await closed_loop(server.target, [b"{}"] * 3, 1)
        assert server.connections == 3


@pytest.mark.parametrize("cut", [len(CHUNKED) - 1, len(CHUNKED) - 5, len(CHUNKED) // 2, CHUNKED.index(b"\r\n\r\n") + 4])
async def test_a_cut_stream_is_an_error(cut: int) -> None:
    with scripted(CHUNKED[:cut], close=True) as server:
        assert (await ask_once(server.target)).error == "the server closed the connection in the middle of its answer"


async def test_a_stream_without_its_end_is_an_error() -> None:
    """The connection ends as HTTP wants it, the stream does not end as OpenAI's do."""
    with scripted(UNTIL_CLOSE.replace(b"data: [DONE]\n\n", b""), close=True) as server:
        assert (await ask_once(server.target)).error == "the stream ended without [DONE]"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "the server closed the connection without an answer"),
        (b"HTTP/1.1 200 O", "the server closed the connection without an answer"),
        (b"SSH-2.0-server\r\n", "the server does not speak HTTP"),
        (STREAM + b"transfer-encoding: chunked\r\n\r\nnot a size\r\n", "the server does not speak HTTP"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "HTTP 204"),
        (b"HTTP/1.1 500 Oops\r\ncontent-length: 4\r\n\r\noops", "HTTP 500: oops"),
    ],
)
async def test_misbehaving_servers(answer: bytes, error: str) -> None:
    with scripted(answer, close=True) as server:
        assert (await ask_once(server.target)).error.startswith(error)


async def test_a_refusal_is_told_in_the_servers_words() -> None:
    body = json.dumps({"error": {"message": "the queue\nis full", "code": "server_overloaded"}}).encode()
    answer = b"HTTP/1.1 429 Too Many Requests\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(body, 7)
    with scripted(answer) as server:
        outcomes = await closed_loop(server.target, [b"{}"] * 3, 1)
        assert [outcome.error for outcome in outcomes] == ["HTTP 429: the queue is full"] * 3
        assert server.connections == 1


async def test_a_server_that_never_ends_its_answer() -> None:
    with scripted(CHUNKED[:-30]) as server:
        pool = Pool(server.target.address, timeout=0.3)
        assert (await ask(pool, server.target, b"{}")).error == "no whole answer within 0.3 s"


async def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(HttpError, match="no connection to 127"):
        await get(Address("http", "127.0.0.1", port, ""), "/v1/models", api_key=None, timeout=120)


async def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with scripted(SIZED) as server:
        assert good(await ask_once(server.target))


async def test_plain_http_is_not_taken_for_tls() -> None:
    """A server that speaks plain HTTP where TLS was asked for is an error, not a fallback."""
    with scripted(SIZED, close=True, speaks_first=True) as server:
        target = Target(Address("https", "127.0.0.1", server.port, ""), "m", timeout=120.0)
        assert (await ask_once(target)).error.startswith("no connection to 127.0.0.1")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000", Address("http", "127.0.0.1", 8000, "")),
        ("http://127.0.0.1:8000/v1/", Address("http", "127.0.0.1", 8000, "")),
        ("localhost:81/v1", Address("http", "localhost", 81, "")),
        ("https://host.example/openai/v1", Address("https", "host.example", 443, "/openai")),
        ("http://[::1]:8000", Address("http", "::1", 8000, "")),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert Address.read(url) == address


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port", "http://host/?a=b", "http://me@host", ""])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InvalidRequest, match="no address of a server"):
        Address.read(url)


def test_an_ipv6_host_is_written_in_brackets() -> None:
    assert b"\r\nHost: [::1]:8000\r\n" in Address.read("http://[::1]:8000").request("GET", "/v1/models")
