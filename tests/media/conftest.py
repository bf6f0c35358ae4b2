"""A web server on loopback with every bad habit, and small files to serve."""

from __future__ import annotations

import contextlib
import gzip
import io
import threading
import time
import zlib
from collections.abc import Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
from PIL import Image


class Site(BaseHTTPRequestHandler):
    """`/gzip` and so on are methods below; the server's `files` are served as they are."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        name = self.path.split("?")[0].strip("/")
        with contextlib.suppress(ConnectionError):  # the fetcher hangs up when it has had enough
            if name in self.server.files:
                self.answer(200, self.server.files[name])
            else:
                getattr(self, "page_" + name.split("/")[0].replace("-", "_"), self.page_missing)()

    def answer(self, status: int, body: bytes = b"", **fields: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | fields).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def page_missing(self) -> None:
        self.answer(404)

    def page_error(self) -> None:
        self.answer(503, b"secret internal text")

    def page_redirect(self) -> None:
        """/redirect?TARGET"""
        self.answer(302, Location=self.path.partition("?")[2])

    def page_loop(self) -> None:
        self.answer(307, Location="/loop")

    def page_down(self) -> None:
        """/down/N redirects N times, then gives the picture."""
        left = int(self.path.rpartition("/")[2])
        self.answer(301, Location=f"/down/{left - 1}") if left else self.answer(200, self.server.files["red.png"])

    def page_gzip(self) -> None:
        self.answer(200, gzip.compress(self.server.files["red.png"]), Content_Encoding="gzip")

    def page_deflate(self) -> None:
        self.answer(200, zlib.compress(self.server.files["red.png"]), Content_Encoding="deflate")

    def page_gzip_cut(self) -> None:
        self.answer(200, gzip.compress(self.server.files["red.png"])[:-12], Content_Encoding="gzip")

    def page_gzip_false(self) -> None:
        self.answer(200, b"this is not gzip", Content_Encoding="gzip")

    def page_brotli(self) -> None:
        self.answer(200, b"whatever", Content_Encoding="br")

    def page_bomb(self) -> None:
        """32 MB of zeros in 32 KB."""
        self.answer(200, gzip.compress(bytes(32 << 20)), Content_Encoding="gzip")

    def page_large(self) -> None:
        """Says that it is large, and sends nothing."""
        self.answer(200, Content_Length=str(1 << 40))

    def page_no_length(self) -> None:
        self.answer_open()
        self.wfile.write(self.server.files["red.png"])

    def page_endless(self) -> None:
        self.answer_open()
        try:
            while self.server.sent < 1 << 30:
                self.wfile.write(bytes(1 << 16))
                self.server.sent += 1 << 16
        except ConnectionError:
            self.server.was_left.set()

    def page_drip(self) -> None:
        """A byte now and then: no single read is slow."""
        self.answer_open()
        while not self.server.over.wait(0.05):
            self.wfile.write(b"x")
            self.wfile.flush()

    def page_slow(self) -> None:
        time.sleep(0.2)
        self.answer(200, self.server.files["red.png"])

    def page_silent(self) -> None:
        self.server.over.wait()

    def page_cut(self) -> None:
        self.answer(200, b"half", Content_Length="8")
        self.close_connection = True

    def answer_open(self) -> None:
        """A body that ends when the connection does."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, files: dict[str, bytes]) -> None:
        super().__init__((host, 0), Site)
        self.files = files
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.sent = 0
        self.was_left = threading.Event()  # the fetcher hung up in the middle of "endless"
        self.over = threading.Event()

    def url(self, path: str = "", host: str | None = None) -> str:
        return f"http://{host or self.server_address[0]}:{self.server_port}/{path}"


@contextlib.contextmanager
def serving(host: str, files: dict[str, bytes]) -> Iterator[Server]:
    with Server(host, files) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def png(colour: str, size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def site() -> Iterator[Server]:
    """On 127.0.0.1, with red.png."""
    with serving("127.0.0.1", {"red.png": png("red")}) as server:
        yield server


@pytest.fixture
def second_site() -> Iterator[Server]:
    """On 127.0.0.2, with blue.png: tests let it stand for the public internet."""
    with serving("127.0.0.2", {"blue.png": png("blue")}) as server:
        yield server


def clip(
    levels: list[int],
    *,
    container: str = "matroska",
    codec: str = "ffv1",
    pixel_format: str = "bgr0",
    rate: Fraction | int = 10,
    size: tuple[int, int] = (48, 64),
) -> bytes:
    """A video whose frames are plain greys of these levels; without loss unless asked otherwise. `size` is (h, w)."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level, dtype=np.uint8), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()
