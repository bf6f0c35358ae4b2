"""A tiny server on a real socket that answers each connection with the bytes it was told to, and counts requests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Misbehaving:
    url: str
    requests: list[bytes] = field(default_factory=list)

    def posts(self, path: str) -> int:
        return sum(request.startswith(f"POST {path} ".encode()) for request in self.requests)


def reply(status: str, body: bytes = b"", *headers: str) -> bytes:
    """A whole answer; the connection ends with it."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


STREAM = b'data: {"choices":[{"index":0,"delta":{"content":"yes"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


@contextmanager
def misbehaving(answers: Sequence[bytes]) -> Iterator[Misbehaving]:
    """The n-th connection gets `answers[n]` once its request is read, then is closed; the last answer repeats."""
    listener = socket.create_server(("127.0.0.1", 0))
    running = Misbehaving(f"http://127.0.0.1:{listener.getsockname()[1]}")

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                request = _read(peer)
                running.requests.append(request)
                peer.sendall(answers[min(len(running.requests), len(answers)) - 1])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(60)


def _read(peer: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += peer.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += peer.recv(65536)
    return head + b"\r\n\r\n" + body
