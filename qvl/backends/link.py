"""One connection to an engine process, from the asker's side. Knows frames; does not know what the messages are for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from qvl.engine.protocol import FrameBuffer, FromEngine, ProtocolError, ToEngine, decode_from_engine, encode, frame

CONNECT_EVERY_SECONDS = 0.02


class EngineLink(asyncio.Protocol):
    """`on_message` gets every message of the engine, then `on_lost` is called once, when no more will come."""

    def __init__(self, on_message: Callable[[FromEngine], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._frames = FrameBuffer()
        self._transport: asyncio.WriteTransport | None = None

    async def connect(self, path: str, give_up: Callable[[], bool]) -> bool:
        """Connect to the socket at `path` as soon as somebody listens there; False when `give_up` says so first."""
        while not give_up():
            try:
                sock = _connected(path)
            # Nobody there yet, or any more; an engine that dies as it is connected to; one whose queue is full.
            except (FileNotFoundError, ConnectionError, BlockingIOError):
                await asyncio.sleep(CONNECT_EVERY_SECONDS)
                continue
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=sock)
            return True
        return False

    @property
    def connected(self) -> bool:
        return self._transport is not None

    def send(self, message: ToEngine) -> None:
        """Queue `message`; where the connection has ended it goes nowhere."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(encode(message)))

    def close(self) -> None:
        """`on_lost` follows. Safe to call twice."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._on_message(decode_from_engine(body))
        except ProtocolError:
            # An engine that does not speak our language is of no use.
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost()


def _connected(path: str) -> socket.socket:
    """A connection to `path`, without waiting: a unix socket knows at once.

    Left to the loop, one that is not made is an error (uvloop) or looks like one that was made and lost (asyncio).
    """
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock
