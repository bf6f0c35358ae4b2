"""Running the server in this process until it is told to stop, and the way down.

Knows uvicorn and signals. Does not know routes or engines.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from qvl.backends.base import Backend
from qvl.engine.garbage import settle
from qvl.errors import QvlError
from qvl.server.door import BACKLOG, CLOSE_SECONDS, bind, ready_line, url_of
from qvl.server.http_protocol import http_protocol
from qvl.server.options import ServerOptions
from qvl.server.start import start_logging

if TYPE_CHECKING:
    from fastapi import FastAPI

    from qvl.server.service import Service

KEEP_ALIVE_SECONDS = 75
# Threads that prepare pictures hand the interpreter over to the loop this soon (Python's default is five times that).
SWITCH_SECONDS = 0.001


class Server(uvicorn.Server):
    """uvicorn with another way down: the first signal drains, the second one ends the draining; the exit code is 0.

    `held` are signals that came before this server could hear them.
    """

    def __init__(self, config: uvicorn.Config, service: Service, held: Sequence[int] = ()) -> None:
        super().__init__(config)
        self._service = service
        self._held = held
        self._deadline: float | None = None
        self.start_error: QvlError | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            for sign in self._held:
                self.handle_exit(sign, None)
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._deadline is None:
            self._service.admission.draining = True
            self._deadline = now + self._service.options.drain_seconds
        elif self._deadline > now:
            self._deadline = now
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        if self._deadline is not None and self._drained():
            # What still runs is told so by the backend, in its stream or as a 503, instead of losing its connection.
            await self._service.backend.stop()
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn would leave the app as it stands, and tell so with a traceback
            await self.lifespan.shutdown()

    def _drained(self) -> bool:
        assert self._deadline is not None
        return self._service.admission.running == 0 or time.monotonic() >= self._deadline


def run(options: ServerOptions, backend: Backend, held: Sequence[int] = ()) -> int:
    """Serve until SIGTERM or SIGINT, or not at all where one of them is `held`; returns 0.

    Raises `ConfigError` when the address cannot be bound, and whatever `backend.start` raises; the server is down then.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    listener = bind(options)
    listener.listen(BACKLOG)
    url = url_of(options, listener)
    start_logging(options)
    backend.launch()
    # Half a second of imports, during which the engine process already loads its own.
    from qvl.server.app import create_app

    def started(error: QvlError | None) -> None:
        if error is None:
            settle()
            print(ready_line(url + options.root_path, backend.info, options.served_model_names), flush=True)
        else:
            server.start_error = error
            server.should_exit = True

    server = make_server(create_app(backend, options, started), options, held)
    print(f"qvl: HTTP is up on {url}, the model is loading", file=sys.stderr, flush=True)
    server.run(sockets=[listener])
    if server.start_error is not None:
        raise server.start_error
    return 0


def make_server(app: FastAPI, options: ServerOptions, held: Sequence[int] = ()) -> Server:
    """The server of an app from `create_app`."""
    config = uvicorn.Config(
        app,
        http=http_protocol(options),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=options.access_log,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    return Server(config, app.state.service, held)
