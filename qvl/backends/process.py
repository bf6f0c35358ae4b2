"""One life of an engine process: started, connected to, watched until it ends.

Knows processes. Does not know what the messages are for, nor when to start another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import threading
from collections.abc import Callable, Sequence

import msgspec

from qvl.backends.link import EngineLink
from qvl.engine.options import EngineOptions
from qvl.engine.protocol import FromEngine, ToEngine


class EngineProcess:
    """A worker and a connection to it: `launch` needs no loop, everything else runs on the loop of `connect`."""

    def __init__(self, command: Sequence[str], options: EngineOptions, socket: str, scratch: Sequence[str]) -> None:
        self._command = list(command)
        self._socket = socket
        level = logging.getLogger().getEffectiveLevel()
        setup = {"options": options, "socket": socket, "scratch": list(scratch), "log_level": level}
        self._setup = msgspec.json.encode(setup) + b"\n"
        self._process: subprocess.Popen[bytes] | None = None
        self._link: EngineLink | None = None
        self._on_end: Callable[[int], None] | None = None
        self._exit_code: int | None = None
        self._connecting = False

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
        self._on_end = on_end
        self._link = EngineLink(on_message, self._disconnected)
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._wait, args=(self._process, loop), name="qvl-engine-wait", daemon=True).start()
        self._connecting = True
        try:
            await self._link.connect(self._socket, lambda: self._exit_code is not None)
        finally:
            self._connecting = False
        self._tell_end()

    def send(self, message: ToEngine) -> None:
        """Queue `message`; after the end of the process it goes nowhere."""
        if self._link is not None:
            self._link.send(message)

    def close(self) -> None:
        """End the process at once: it is killed, and its lifeline cut. `on_end` follows. Safe to call twice.

        In this order: one that still ran when its lifeline ends would take us for dead, and remove the folders that
        the next one needs.
        """
        if self._process is None:
            return
        self._process.kill()  # does nothing to a process that has been waited for
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _wait(self, process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop) -> None:
        code = process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            loop.call_soon_threadsafe(self._ended, code)

    def _ended(self, code: int) -> None:
        self._exit_code = code
        self.close()
        self._tell_end()

    def _disconnected(self) -> None:
        """A worker without its connection is of no use, should it still run."""
        self.close()
        self._tell_end()

    def _tell_end(self) -> None:
        """Once: when the process is gone, and with it the connection, on which its last words may still lie."""
        connected = self._connecting or (self._link is not None and self._link.connected)
        if self._exit_code is not None and not connected and self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self._exit_code)
