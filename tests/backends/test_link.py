"""A connection to an engine's socket at every unlucky moment of the engine's life."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from qvl.backends.engines import SharedEngine
from qvl.backends.link import EngineLink
from qvl.engine.protocol import EngineInfo, FromEngine, Outputs, Ready, encode, frame

READY = Ready(EngineInfo("m", "cpu", "float32", "", 1, 16, 16, 0.0), "{}")
LIMIT = 60


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "engine"


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """HTTP processes run on uvloop, to which a failed connection is an error; to asyncio's loop it is a lost one."""
    loop_factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run(main: Any) -> Any:
        loop = loop_factory()
        try:
            return loop.run_until_complete(asyncio.wait_for(main, LIMIT))
        finally:
            loop.close()

    return run


def listen(path: Path, backlog: int = 8) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(backlog)
    listener.setblocking(False)
    return listener


class Heard:
    """The other end of `SharedEngine`: what it said, in order."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def engine_ready(self, ready: Ready) -> None:
        self.words.append("ready")

    def engine_said(self, outputs: Outputs) -> None:
        self.words.append("outputs")

    def engine_lost(self) -> None:
        self.words.append("lost")

    async def until(self, word: str) -> None:
        while word not in self.words:
            await asyncio.sleep(0.01)


async def _told_by(listener: socket.socket, message: FromEngine) -> socket.socket:
    """Accept as an engine does, and say something."""
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    connection.sendall(frame(encode(message)))
    return connection


def test_an_engine_that_dies_while_it_is_connected_to(path: Path, run: Callable[[Any], Any]) -> None:
    """Its listener is closed with the connection still in its queue: that resets the connection."""

    async def main() -> list[str]:
        heard = Heard()
        dying = listen(path)
        running = asyncio.ensure_future(SharedEngine(str(path), [], lambda: 0).run(heard))
        await asyncio.sleep(0)  # it has called connect(), and nobody has looked at the outcome
        dying.close()
        with listen(path) as alive:
            telling = asyncio.ensure_future(_told_by(alive, READY))
            await asyncio.wait((running, telling), return_when="FIRST_COMPLETED")
            assert not running.done(), running.exception()
            with await telling:
                await heard.until("ready")
        running.cancel()
        return heard.words

    assert run(main())[-1] == "ready"


def test_a_queue_that_is_full_is_waited_for(path: Path, run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        heard: list[FromEngine] = []
        lost = asyncio.Event()
        link = EngineLink(heard.append, lost.set)
        with listen(path, backlog=1) as listener:
            others = fill(path)
            connecting = asyncio.ensure_future(link.connect(str(path), lambda: False))
            await asyncio.sleep(0.1)
            assert not link.connected and not lost.is_set()
            for other in others:
                other.close()
                listener.accept()[0].close()
            assert await connecting
            with await _told_by(listener, READY):
                while not heard:
                    await asyncio.sleep(0.01)
        assert heard == [READY]

    run(main())


def fill(path: Path) -> list[socket.socket]:
    """Connections that nobody accepts: all that there is room for."""
    waiting: list[socket.socket] = []
    while True:
        one = socket.socket(socket.AF_UNIX)
        one.setblocking(False)
        try:
            one.connect(str(path))
        except BlockingIOError:
            one.close()
            return waiting
        waiting.append(one)


def test_it_gives_up_when_told_to(path: Path, run: Callable[[Any], Any]) -> None:
    answers = iter([False, False, True])
    assert not run(EngineLink(lambda _: None, lambda: None).connect(str(path), lambda: next(answers)))


def test_an_engine_that_talks_nonsense_is_left(path: Path, run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        lost = asyncio.Event()
        link = EngineLink(lambda _: None, lost.set)
        with listen(path) as listener:
            assert await link.connect(str(path), lambda: False)
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            with connection:
                connection.sendall(frame(b"\xc1"))
                await lost.wait()
                link.send(READY)  # type: ignore[arg-type]  # goes nowhere
        assert not link.connected

    run(main())
