"""A real server on a free port of the loopback address, in a thread, for the time of a test."""

from __future__ import annotations

import asyncio
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import requests
import uvicorn

from qvl.backends.base import Backend
from qvl.server.app import create_app
from qvl.server.http_protocol import http_protocol
from qvl.server.options import ServerOptions
from qvl.server.service import Service


@dataclass
class Live:
    url: str
    port: int
    service: Service
    loop: asyncio.AbstractEventLoop

    def post(self, path: str, body: Any, **more: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=120, **more)

    def get(self, path: str, **more: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=120, **more)

    def metric(self, name: str) -> float:
        """The value of one line of /metrics."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)

    def wait_metric(self, name: str, value: float) -> None:
        wait_until(lambda: self.metric(name) == value, f"{name} never became {value}")


def wait_until(condition: Any, message: str | Callable[[], str], seconds: float = 120.0) -> None:
    """Poll; a slow machine is no failure. A function as `message` is asked when time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message if isinstance(message, str) else message()
        time.sleep(0.02)


def first_line(popen: subprocess.Popen[str], log: Callable[[], str], seconds: float = 120.0) -> str:
    """What the process says first on its standard output."""
    assert popen.stdout is not None
    told, _, _ = select.select([popen.stdout], [], [], seconds)
    assert told, f"it said nothing in {seconds:.0f} s; {log()}"
    line = popen.stdout.readline()
    assert line, f"it ended with exit code {popen.wait(seconds)}; {log()}"
    return line


@contextmanager
def live(backend: Backend, options: ServerOptions | None = None, *, wait_ready: bool = True) -> Iterator[Live]:
    """Serves `backend` until the block ends; the socket, the protocol and the layers are those of `qvl serve`."""
    options = replace(options or ServerOptions(), port=0)
    app = create_app(backend, options)
    config = uvicorn.Config(
        app,
        port=0,
        http=http_protocol(options),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive(), "the server did not start")
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Live(f"http://127.0.0.1:{port}", port, app.state.service, loops[0])
    try:
        if wait_ready:
            wait_until(lambda: running.get("/ready").status_code == 200, "the backend never became ready")
        yield running
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive(), "the server did not stop"
