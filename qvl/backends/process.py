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
    """A worker and the one connection to it: `launch` needs no loop, everything else runs on the loop of `connect`."""

    def __init__(self, command: Sequence[str], options: EngineOptions, socket: str, scratch: Sequence[str]) -> None:
        self._command = list(command)
        self._socket = socket
        level = logging.getLogger().getEffectiveLevel()
        setup = {"options": options, "socket": socket, "scratch": list(scratch), "log_level": level}
        self._setup = msgspec.json.encode(setup) + b"\n"
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._on_message: Callable[[FromEngine], None] | None = None
        self._on_end: Callable[[int], None] | None = None
        self._exit_code: int | None = None

    @property
    def pid(self) -> int | None:
        """The worker's process id while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def launch(self) -> None:
        """Start the process. It loads the model by itself from here on."""
        # A session of its own: Ctrl-C in a terminal is for the server, which then drains; the worker must outlive that.
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(self._setup)
            self._process.stdin.flush()

    async def connect(self, on_message: Callable[[FromEngine], None], on_end: Callable[[int], None]) -> None:
        """Connect to the launched process; returns also when it has ended.

        `on_message` gets every message of the worker; `on_end` is called once, with the exit code, when the process is
        gone and all it said has been heard.
        """
        assert self._process is not None
        self._on_message, self._on_end = on_message, on_end
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._wait, args=(self._process, loop), name="qvl-engine-wait", daemon=True).start()
        while self._exit_code is None:
            try:
                await loop.create_unix_connection(lambda: _Link(self), self._socket)
                return
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(CONNECT_EVERY_SECONDS)

    def send(self, message: ToEngine) -> None:
        """Queue `message`; after the end of the process it goes nowhere."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(encode(message)))

    def close(self) -> None:
        """End the process at once: its lifeline is cut, and it is killed. `on_end` follows. Safe to call twice."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.kill()  # does nothing to a process that has been waited for

    def _wait(self, process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop) -> None:
        code = process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            loop.call_soon_threadsafe(self._ended, code)

    def _ended(self, code: int) -> None:
        self._exit_code = code
        self.close()
        self._tell_end()

    def _tell_end(self) -> None:
        """Once: when the process is gone, and with it the connection, on which its last words may still lie."""
        if self._exit_code is not None and self._transport is None and self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self._exit_code)

    def connected(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def received(self, body: bytes) -> None:
        if self._on_message is not None:
            self._on_message(decode_from_engine(body))

    def disconnected(self) -> None:
        """A worker without its connection is of no use, should it still run."""
        self._transport = None
        self.close()
        self._tell_end()


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
        self._owner.disconnected()
