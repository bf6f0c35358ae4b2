"""Where a backend's engine comes from: a process of its own (`OwnEngine`), or one that others keep (`SharedEngine`).

Either is launched, then run for as long as the backend lives, and tells a `Hearer` what it hears and when the engine
is there and when not. Knows lives and restarts. Does not know requests.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from qvl.backends.link import EngineLink
from qvl.backends.process import EngineProcess
from qvl.backends.scratch import ScratchFolder, bases, remove_stale, socket_base
from qvl.engine.options import EngineOptions
from qvl.engine.protocol import Failed, FromEngine, Outputs, Ready, ToEngine
from qvl.errors import ConfigError

logger = logging.getLogger("qvl.backend")

WORKER = (sys.executable, "-m", "qvl.engine.worker")
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 30.0
# An engine that lived this long has not failed at its start: the next pause is the first one again.
STEADY_SECONDS = 60.0


class Hearer(Protocol):
    """Who waits for an engine; called on the loop of `run`."""

    def engine_ready(self, ready: Ready) -> None:
        """Requests may be sent from now on."""

    def engine_said(self, outputs: Outputs) -> None:
        """What a step brought."""

    def engine_lost(self) -> None:
        """All requests are lost; another `engine_ready` may follow."""


class Engine(Protocol):
    """An engine process, as a backend sees it."""

    @property
    def pid(self) -> int | None:
        """The process id of an engine of our own while it runs."""

    @property
    def restarts(self) -> int:
        """How many engines have ended."""

    @property
    def folders(self) -> Sequence[Path]:
        """Where pixels for it are put, the best place first; there once `launch` has returned."""

    def launch(self) -> None:
        """Begin what takes long, before there is a loop. Safe to call twice."""

    async def run(self, hearer: Hearer) -> None:
        """One engine after another, until cancelled. Raises `ConfigError` when the first one does not come up."""

    def send(self, message: ToEngine) -> None:
        """Queue `message`; where there is no engine it goes nowhere."""

    def stop(self) -> None:
        """End the engine at once and give everything back. Safe to call twice."""


class OwnEngine:
    """An engine process started here, and started again when it dies. `command` is another one in tests."""

    def __init__(self, options: EngineOptions, command: Sequence[str] = WORKER) -> None:
        self.restarts = 0
        self._options = options
        self._command = command
        self._scratch: list[ScratchFolder] = []
        self._sockets: ScratchFolder | None = None
        self._process: EngineProcess | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def folders(self) -> Sequence[Path]:
        return [folder.path for folder in self._scratch]

    @property
    def socket(self) -> Path:
        """Where every life of the engine listens; there is no such file while none does."""
        assert self._sockets is not None
        return self._sockets.path / "engine"

    def launch(self) -> None:
        if self._sockets is not None:
            return
        for base in {*bases(), socket_base()}:
            remove_stale(base)
        self._scratch = [ScratchFolder(base) for base in bases()]
        self._sockets = ScratchFolder(socket_base())
        self._process = self._new_process()
        self._process.launch()

    async def run(self, hearer: Hearer) -> None:
        self.launch()
        pause = FIRST_PAUSE_SECONDS
        came_up = False
        while True:
            born = time.monotonic()
            was_ready, failure = await self._one_life(hearer)
            came_up |= was_ready
            if not came_up:
                raise ConfigError(failure)
            self.restarts += 1
            hearer.engine_lost()
            if time.monotonic() - born > STEADY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            logger.error("%s; starting another in %.1f s", failure, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def send(self, message: ToEngine) -> None:
        if self._process is not None:
            self._process.send(message)

    def stop(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None
        for folder in (*self._scratch, self._sockets):
            if folder is not None:
                folder.close()

    def _new_process(self) -> EngineProcess:
        assert self._sockets is not None
        self.socket.unlink(missing_ok=True)  # of an earlier life
        scratch = [str(folder.path) for folder in (*self._scratch, self._sockets)]
        return EngineProcess(self._command, self._options, str(self.socket), scratch)

    async def _one_life(self, hearer: Hearer) -> tuple[bool, str]:
        """One engine process to its end: whether it ever was ready, and what it died of."""
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        was_ready = False
        last_words: list[str] = []

        def hear(message: FromEngine) -> None:
            nonlocal was_ready
            if isinstance(message, Outputs):
                hearer.engine_said(message)
            elif isinstance(message, Ready):
                was_ready = True
                hearer.engine_ready(message)
            elif isinstance(message, Failed):
                last_words.append(message.message)

        def end(code: int) -> None:
            if not ended.done():  # stopped: nobody waits any more
                ended.set_result(code)

        process = self._process or self._new_process()
        self._process = process
        try:
            if process.pid is None:
                process.launch()
            await process.connect(hear, end)
            code = await ended
        except OSError as error:  # too many processes or too little memory, for now
            return was_ready, f"the engine process cannot be started: {error.strerror or error}"
        finally:
            self._process = None
            process.close()
        return was_ready, last_words[0] if last_words else f"the engine process ended with exit code {code}"


class SharedEngine:
    """An engine that a parent process keeps, and starts again, at the same `socket`; each life is connected to.

    `folders` are this process's own places for pixels, `restarts` asks the parent's count.
    """

    pid = None

    def __init__(self, socket: str, folders: Sequence[Path], restarts: Callable[[], int]) -> None:
        self.folders = folders
        self._socket = socket
        self._restarts = restarts
        self._link: EngineLink | None = None

    @property
    def restarts(self) -> int:
        return self._restarts()

    def launch(self) -> None:
        """The parent does."""

    async def run(self, hearer: Hearer) -> None:
        while True:
            lost = asyncio.Event()
            link = EngineLink(lambda message: _pass_on(message, hearer), lost.set)
            await link.connect(self._socket, lambda: False)
            self._link = link
            await lost.wait()
            self._link = None
            hearer.engine_lost()

    def send(self, message: ToEngine) -> None:
        if self._link is not None:
            self._link.send(message)

    def stop(self) -> None:
        if self._link is not None:
            self._link.close()


def _pass_on(message: FromEngine, hearer: Hearer) -> None:
    """What an engine cannot start for (`Failed`) is its keeper's to tell."""
    if isinstance(message, Outputs):
        hearer.engine_said(message)
    elif isinstance(message, Ready):
        hearer.engine_ready(message)
