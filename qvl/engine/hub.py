"""The engine process's door: one unix socket, several HTTP processes, one thread that reads and writes for all of them.

The thread cuts frames, decodes them and maps pixel files, so that the engine's loop only takes finished events from a
queue. Sending is tried at once on the caller's thread; what the socket does not take is left to the door's thread, so
that a client that does not read cannot stop the engine: above MAX_UNSENT_BYTES its connection is closed.
Knows sockets, frames and files of pixels. Does not know the engine, nor torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from qvl.engine.pixels import Pixels, Room, map_pixels
from qvl.engine.protocol import (
    AddRequest,
    EngineStats,
    FrameBuffer,
    FromEngine,
    Outputs,
    ToEngine,
    TokenOutput,
    UseRoom,
    decode_to_engine,
    encode,
    frame,
)
from qvl.errors import QvlError

logger = logging.getLogger("qvl.engine")

MAX_UNSENT_BYTES = 64 * 1024 * 1024
READ_BYTES = 256 * 1024


class Connection:
    """One HTTP process. `send` may be called by any thread."""

    def __init__(self, sock: socket.socket, wake: Callable[[], None]) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.frames = FrameBuffer()
        self.closed = False
        self.rooms: dict[str, Room] = {}
        self._unsent = bytearray()
        self._lock = threading.Lock()
        self._wake = wake

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent) and not self.closed

    def send(self, message: FromEngine) -> None:
        """Send `message`, or leave the rest of it to the door's thread; never blocks, never raises."""
        data = frame(encode(message))
        with self._lock:
            if self.closed:
                return
            if self._unsent:
                self._unsent += data
                self.closed = len(self._unsent) > MAX_UNSENT_BYTES
            else:
                self._unsent += data[self._write(data) :]
            needs_thread = bool(self._unsent) or self.closed
        if needs_thread:
            self._wake()

    def flush(self) -> None:
        """Write what was left over, as far as the socket takes it."""
        with self._lock:
            del self._unsent[: self._write(self._unsent)]

    def _write(self, data: bytes | bytearray) -> int:
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self.closed = True
            return len(data)


@dataclass(frozen=True, slots=True)
class Joined:
    """An HTTP process connected."""

    connection: Connection


@dataclass(frozen=True, slots=True)
class Left:
    """An HTTP process is gone: nobody waits for its requests any more."""

    connection: Connection


@dataclass(frozen=True, slots=True)
class Shares:
    """An HTTP process shares memory for pixels from now on."""

    connection: Connection
    room: Room


@dataclass(frozen=True, slots=True)
class Received:
    """A message; `pixels` has one array per medium of an `AddRequest`, None where none came along."""

    connection: Connection
    message: ToEngine
    pixels: tuple[Pixels | None, ...] = ()


Event: TypeAlias = Joined | Left | Shares | Received


class Hub:
    """Accepts on `listener` and fills `events`. When `lifeline` (a file descriptor) ends, `orphaned` is called."""

    def __init__(self, listener: socket.socket, lifeline: int, orphaned: Callable[[], None]) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.connections: set[Connection] = set()
        self._listener = listener
        self._lifeline = lifeline
        self._orphaned = orphaned
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="qvl-hub", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 1.0) -> None:
        """Let the thread send what is left (for `timeout` seconds at most), then end it."""
        self._stopping = True
        self._wake()
        self._thread.join(timeout)

    def broadcast(self, message: FromEngine) -> None:
        for connection in tuple(self.connections):
            connection.send(message)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes just as well
            os.write(self._wake_write, b".")

    def _run(self) -> None:
        try:
            self._serve_all()
        except BaseException:  # the border of the process: a deaf engine would keep its askers waiting for ever
            logger.exception("the engine's door is broken")
            os._exit(1)

    def _serve_all(self) -> None:
        self._listener.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ, self._accept)
            selector.register(self._lifeline, selectors.EVENT_READ, self._watch_parent)
            selector.register(self._wake_read, selectors.EVENT_READ, self._drain_wakes)
            while not (self._stopping and not any(c.has_unsent for c in self.connections)):
                for key, ready in selector.select():
                    if isinstance(key.data, Connection):
                        self._serve(key.data, ready)
                    else:
                        key.data()
                self._update(selector)

    def _update(self, selector: selectors.BaseSelector) -> None:
        """Watch new connections, forget closed ones, ask for room where something is left to send."""
        registered = selector.get_map()
        for connection in tuple(self.connections):
            interest = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.has_unsent else 0)
            if connection.closed:
                self._forget(selector, connection)
            elif connection.sock not in registered:
                selector.register(connection.sock, interest, connection)
            else:
                selector.modify(connection.sock, interest, connection)

    def _forget(self, selector: selectors.BaseSelector, connection: Connection) -> None:
        with contextlib.suppress(KeyError):
            selector.unregister(connection.sock)
        connection.sock.close()
        self.connections.discard(connection)
        self.events.put(Left(connection))

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            sock, _ = self._listener.accept()
            connection = Connection(sock, self._wake)
            self.connections.add(connection)
            self.events.put(Joined(connection))

    def _watch_parent(self) -> None:
        if not os.read(self._lifeline, 4096):
            self._orphaned()

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _serve(self, connection: Connection, ready: int) -> None:
        if ready & selectors.EVENT_WRITE:
            connection.flush()
        if ready & selectors.EVENT_READ:
            try:
                data = connection.sock.recv(READ_BYTES)
                for body in connection.frames.feed(data):
                    self._receive(connection, body)
                connection.closed |= not data
            except BlockingIOError:
                pass
            except (OSError, QvlError) as error:
                logger.error("closing a connection: %s", error)
                connection.closed = True

    def _receive(self, connection: Connection, body: bytes) -> None:
        message = decode_to_engine(body)
        if isinstance(message, UseRoom):
            self._share(connection, message)
            return
        if not isinstance(message, AddRequest):
            self.events.put(Received(connection, message))
            return
        pixels: list[Pixels | None] = []
        lost = ""
        for item in message.media:  # all of them, so that no file or ticket of them is left over
            try:
                pixels.append(map_pixels(item.pixels, connection.rooms))
            except (OSError, ValueError, QvlError) as error:
                lost = str(error)  # the error itself would keep the others' pixels
        if lost:
            logger.error("request %s: its pixels cannot be mapped: %s", message.request_id, lost)
            connection.send(refusal(message.request_id, "the pixels of its media were lost on the way to the engine"))
            return
        self.events.put(Received(connection, message, tuple(pixels)))

    def _share(self, connection: Connection, message: UseRoom) -> None:
        try:
            room = connection.rooms[message.path] = Room(message)
        except (OSError, ValueError) as error:
            logger.warning("pictures take the slower way, as their memory cannot be shared: %s", error)
        else:
            self.events.put(Shares(connection, room))


def refusal(request_id: str, reason: str) -> Outputs:
    """The last word on a request that the engine does not take."""
    return Outputs([TokenOutput(request_id, [], finish_reason="error", error=reason)], EngineStats())
