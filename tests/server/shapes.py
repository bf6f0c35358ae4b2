"""The request shapes that people send, as they send them, and the pictures in them."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageDraw


@functools.cache
def picture(number: int = 0, form: str = "JPEG") -> bytes:
    """A small picture with some structure; every number is another one."""
    image = Image.new("RGB", (84 + 28 * number, 56), (250, 240, 20 * number % 256))
    ImageDraw.Draw(image).rectangle((10, 10, 40 + number, 40), fill=(200, 30 * number % 256, 40))
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def encoded(number: int = 0) -> str:
    return base64.b64encode(picture(number)).decode()


def text_only() -> dict[str, Any]:
    return {
        "model": "",
        "messages": [{"role": "user", "content": "Tell me a story about a lighthouse."}],
        "temperature": 0.01,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "max_tokens": 24,
    }


def picture_by_url(url: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "What is in the picture?"},
                ],
            },
        ],
        "max_tokens": 24,
        "temperature": 0,
    }


def picture_as_data_url() -> dict[str, Any]:
    return picture_by_url(f"data:image/jpeg;base64,{encoded(1)}")


def two_pictures() -> dict[str, Any]:
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded(number)}"}} for number in (1, 2)
    ]
    text = {"type": "text", "text": "What differs between the two?"}
    return {"messages": [{"role": "user", "content": [*pictures, text]}], "max_tokens": 24, "temperature": 0}


def three_turns() -> dict[str, Any]:
    """The assistant's earlier answers come back as lists of text parts."""
    picture = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded(3)}"}}
    return {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [picture, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A red box."}]},
            {"role": "user", "content": [{"type": "text", "text": "Which colour is behind it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Yellow"}, {"type": "text", "text": "."}]},
            {"role": "user", "content": "Are you sure?"},
        ],
        "max_tokens": 24,
        "temperature": 0,
    }


@contextmanager
def picture_host() -> Iterator[str]:
    """A web server of the loopback address that has one picture at every path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(picture())))
            self.end_headers()
            self.wfile.write(picture())

        def log_message(self, *_: Any) -> None:
            pass

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=host.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{host.server_address[1]}/picture.jpg"
    finally:
        host.shutdown()
        host.server_close()
        thread.join()
