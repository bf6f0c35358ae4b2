"""One life of an engine process: started, connected to, watched until it ends.

Knows processes and the socket between. Does not know what the messages are for, nor when to start another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from qvl.engine.options import EngineOptions
from qvl.engine.protocol import (
    FrameBuffer,
    FromEngine,
    ProtocolError,
    ToEngine,
    decode_from_engine,
    encode,
    frame,
)

CONNECT_EVERY_SECONDS = 0.02


class EngineProcess:
    """A worker and the one connection to it. All methods and callbacks run on the loop that called `start`.

    `on_message` gets every message of the worker; `on_end` is called once, with the exit code, when the process is
    gone.
    """

    def __init__(self, on_message: Callable[[FromEngine], None], on_end: Callable[[int], None]) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """The worker's process id while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self, command: Sequence[str], options: EngineOptions, socket: str, scratch: Sequence[str]) -> None:
        """Start `command` and connect. Returns also when the process ended before: `on_end` tells."""
        loop = asyncio.get_running_loop()
        level = logging.getLogger().getEffectiveLevel()
        setup = {"options": options, "socket": socket, "scratch": list(scratch), "log_level": level}
        # A session of its own: Ctrl-C in a terminal is for the server, which then drains; the worker must outlive that.
        process = subprocess.Popen(list(command), stdin=subprocess.PIPE, start_new_session=True)
        self._process = process
        ended = asyncio.Event()
        threading.Thread(target=self._wait, args=(process, loop, ended), name="qvl-engine-wait", daemon=True).start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(msgspec.json.encode(setup) + b"\n")
            process.stdin.flush()
        while not ended.is_set():
            try:
                await loop.create_unix_connection(lambda: _Link(self), socket)
                return
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(CONNECT_EVERY_SECONDS)

    def send(self, message: ToEngine) -> None:
        """Queue `message`; after the end of the process it goes nowhere."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(encode(message)))

    def close(self) -> None:
        """End the process at once: its lifeline is cut, and it is killed. `on_end` follows."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.kill()

    def _wait(self, process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
        code = process.wait()

        def tell() -> None:
            ended.set()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
            if self._transport is not None:
                self._transport.close()
            self._on_end(code)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            loop.call_soon_threadsafe(tell)

    def connected(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def received(self, body: bytes) -> None:
        self._on_message(decode_from_engine(body))


class _Link(asyncio.Protocol):
    """Cuts what arrives into messages."""

    def __init__(self, owner: EngineProcess) -> None:
        self._owner = owner
        self._frames = FrameBuffer()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._owner.connected(cast(asyncio.WriteTransport, transport))

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._owner.received(body)
        except ProtocolError:
            # A worker that does not speak our language is of no use; another one is started.
            self._owner.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.close()
