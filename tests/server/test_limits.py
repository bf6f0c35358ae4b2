"""Caps and what a hostile or unlucky client can do, over raw sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from qvl.backends.echo import EchoBackend
from qvl.server.app import create_app
from qvl.server.options import ServerOptions
from tests.server.held import HeldEcho
from tests.server.live import Live, live, wait_until

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
LONG = {"messages": [{"role": "user", "content": "x" * 3000}]}


@contextmanager
def dial(server: Live) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as sock:
        yield sock


def request_bytes(body: Any, path: str = "/v1/chat/completions", headers: str = "") -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def test_a_body_above_the_cap_is_refused_by_its_announcement() -> None:
    with live(EchoBackend(), ServerOptions(max_body_bytes=10_000)) as server, dial(server) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}}"):
            answer += sock.recv(65536)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"payload_too_large" in answer
        assert server.post("/v1/chat/completions", HELLO).status_code == 200


def test_a_body_without_a_length_is_counted_while_it_arrives() -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 4096

    with live(EchoBackend(), ServerOptions(max_body_bytes=100_000)) as server:
        reply = requests.post(server.url + "/v1/chat/completions", data=pieces(), timeout=120)
        assert reply.status_code == 413
        fits = requests.post(server.url + "/v1/chat/completions", data=iter([json.dumps(HELLO).encode()]), timeout=120)
        assert fits.status_code == 200


def test_all_bodies_together_have_a_cap_too() -> None:
    options = ServerOptions(max_body_bytes=60_000, max_total_body_bytes=70_000)
    with live(EchoBackend(), options) as server, dial(server) as sock:
        data = json.dumps(HELLO).encode().ljust(50_000)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        sock.sendall(head + data[:40_000])
        server.wait_metric("qvl_requests_in_flight", 1)
        # The first body's bytes are counted when the app reads them, a moment after the request is admitted.
        wait_until(lambda: post_raw(server, data).status_code == 429, "the total was never reached")
        sock.sendall(data[40_000:])
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert post_raw(server, data).status_code == 200, "what was held has been given back"


def post_raw(server: Live, data: bytes) -> requests.Response:
    return requests.post(server.url + "/v1/chat/completions", data=data, timeout=120)


@pytest.mark.parametrize("size", [70_000, 5_000_000])
def test_headers_above_the_cap_are_refused(server: Live, size: int) -> None:
    """Complete heads, heads that never end, one endless value, many headers, an endless address."""
    shapes = [
        b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * size + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * size,
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: aaaaaaaa\r\n" * (size // 13),
        b"GET /" + b"a" * size + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ]
    for shape in shapes:
        with dial(server) as sock:
            try:
                for start in range(0, len(shape), 16_384):
                    sock.sendall(shape[start : start + 16_384])
            except (ConnectionResetError, BrokenPipeError):
                pass  # it was refused while it was still arriving
            else:
                assert_refused(sock)
    assert server.get("/health").status_code == 200


def assert_refused(sock: socket.socket) -> None:
    answer = read_all(sock)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 "), answer[:80]


def test_431_is_told_as_an_openai_error(server: Live) -> None:
    with dial(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 66_000 + b"\r\n\r\n")
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "headers_too_large"


def test_headers_within_the_cap_are_served(server: Live) -> None:
    assert server.get("/health", headers={"A": "a" * 30_000}).status_code == 200


def test_a_large_body_before_the_next_head_on_the_same_connection(server: Live) -> None:
    """Bytes of a body are never counted as a head's."""
    body = {"messages": [{"role": "user", "content": " " * 2000}], "user": "x" * 300_000}
    with requests.Session() as session:
        for _ in range(3):
            assert session.post(server.url + "/v1/chat/completions", json=body, timeout=120).status_code == 200


def test_headers_that_trickle_are_cut_off() -> None:
    with live(EchoBackend(), ServerOptions(header_seconds=0.2)) as server, dial(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost")
        assert read_all(sock).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_stalls_is_cut_off_and_gives_its_place_back() -> None:
    with live(EchoBackend(), ServerOptions(stall_seconds=0.2)) as server, dial(server) as sock:
        sock.sendall(request_bytes(HELLO)[:-5])
        assert read_all(sock) == b""
        server.wait_metric("qvl_requests_in_flight", 0)


def test_garbage_is_400(server: Live) -> None:
    with dial(server) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")


def test_a_full_house_is_429_with_retry_after() -> None:
    gate = threading.Event()
    backend = HeldEcho(gate.is_set, max_num_seqs=1)
    with live(backend, ServerOptions(max_queue=1)) as server, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(server.post, "/v1/chat/completions", HELLO) for _ in range(2)]
        server.wait_metric("qvl_requests_in_flight", 2)
        refused = server.post("/v1/chat/completions", HELLO)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "server_overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200
        gate.set()
        assert [one.result().status_code for one in running] == [200, 200]
        server.wait_metric("qvl_requests_in_flight", 0)
        assert server.post("/v1/chat/completions", HELLO).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_leaves_ends_its_request(stream: bool, path: str) -> None:
    with live(EchoBackend(seconds_per_token=0.02)) as server:
        prompt = {"prompt": "x" * 3000} if path == "/v1/completions" else LONG
        with dial(server) as sock:
            sock.sendall(request_bytes({**prompt, "stream": stream}, path))
            server.wait_metric("qvl_engine_running", 1)
        server.wait_metric("qvl_engine_running", 0)
        server.wait_metric("qvl_requests_in_flight", 0)
        assert server.metric("qvl_engine_aborted_total") == 1
        server.wait_metric(f'qvl_http_requests_total{{method="POST",route="{path}",status="499"}}', 1)


def test_a_client_that_leaves_before_its_body_is_complete(server: Live) -> None:
    with dial(server) as sock:
        sock.sendall(request_bytes(HELLO)[:-5])
        server.wait_metric("qvl_requests_in_flight", 1)
    server.wait_metric("qvl_requests_in_flight", 0)


@contextmanager
def slow_reader(stall_seconds: float) -> Iterator[Live]:
    """A server with a client that reads nothing of an answer far larger than what sockets hold."""
    options = ServerOptions(stall_seconds=stall_seconds)
    with live(EchoBackend(max_model_len=2_000_000), options) as server, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(request_bytes({"messages": [{"role": "user", "content": "x" * 200_000}], "stream": True}))
        yield server


def test_a_slow_reader_blocks_nobody() -> None:
    with slow_reader(stall_seconds=600) as server:
        server.wait_metric("qvl_engine_running", 1)
        assert server.post("/v1/chat/completions", HELLO).json()["choices"][0]["message"]["content"] == "hello"
        assert server.metric("qvl_engine_running") == 1


def test_a_slow_reader_is_cut_off_in_the_end() -> None:
    with slow_reader(stall_seconds=0.5) as server:
        server.wait_metric("qvl_engine_aborted_total", 1)
        server.wait_metric("qvl_engine_running", 0)
        server.wait_metric("qvl_requests_in_flight", 0)


def test_many_streams_at_once(server: Live) -> None:
    def one(number: int) -> str:
        body = {"messages": [{"role": "user", "content": f"number {number}"}], "stream": True}
        lines = server.post("/v1/chat/completions", body).text.split("\n\n")[:-2]
        return "".join(json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines)

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(one, range(64))) == [f"number {number}" for number in range(64)]


def test_events_go_through_without_the_short_way_too() -> None:
    """Another ASGI server offers no such extension: the same bytes come by its `send`."""
    sent: list[dict[str, Any]] = []

    async def ask() -> None:
        app = create_app(backend := EchoBackend(), ServerOptions())
        await backend.start()
        body = json.dumps({**HELLO, "stream": True}).encode()
        waiting = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if sent_body:
                await waiting.wait()
            sent_body.append(True)
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        sent_body: list[bool] = []
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
        await app(scope, receive, send)

    asyncio.run(ask())
    events = b"".join(message.get("body", b"") for message in sent).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert "".join(json.loads(one[6:])["choices"][0]["delta"]["content"] for one in events[:-2]) == "hello"


def test_answers_on_one_connection_one_after_another(server: Live) -> None:
    """Sent all at once (pipelined), streamed: each answer is complete and framed before the next one begins."""
    texts = ["first " * 20, "second", "third " * 5]
    bodies = [{"messages": [{"role": "user", "content": text}], "stream": True} for text in texts]
    with dial(server) as sock:
        sock.sendall(b"".join(map(request_bytes, bodies)))
        data = b""
        while data.count(b"0\r\n\r\n") < 3:
            data += sock.recv(65536)
    answers = data.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert [unchunked(answer) for answer in answers] == texts


def unchunked(answer: bytes) -> str:
    """The text of a streamed answer, its frames followed to the letter."""
    rest, body = answer.split(b"\r\n\r\n", 1)[1], b""
    while True:
        size, rest = rest.split(b"\r\n", 1)
        if not int(size, 16):
            break
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    lines = body.decode().split("\n\n")[:-2]
    return "".join(json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines)
