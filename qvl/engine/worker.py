"""The engine process: `python -m qvl.engine.worker`, started by a backend, owner of the device.

It reads one line from standard input, a `Setup` as JSON, and listens on the unix socket that it names before it loads
anything, so that those who wait hear `Failed` as well as `Ready`. Standard input stays open as a lifeline: at its end
the parent is gone, and so is this process at once, whatever it was doing.

Knows how requests come in and outputs go out. Does not know scheduling or models: `Engine` is handed in by
`load_engine`, the only place here that imports torch.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from qvl.engine.garbage import settle
from qvl.engine.hub import Connection, Event, Hub, Joined, Left, Received, Shares, refusal
from qvl.engine.openmp import wait_asleep
from qvl.engine.options import EngineOptions
from qvl.engine.pixels import Pixels, Room
from qvl.engine.protocol import (
    AbortRequest,
    AddRequest,
    Drain,
    EngineInfo,
    EngineStats,
    Failed,
    Outputs,
    Ready,
    TokenOutput,
)
from qvl.errors import QvlError

logger = logging.getLogger("qvl.engine")

EXIT_FAILED = 2
EXIT_CRASHED = 1
# The hub's thread must get the interpreter soon after a request arrives, also while the engine's loop runs Python.
SWITCH_SECONDS = 0.001
NUMBERS_EVERY_SECONDS = 0.25
# When there is bad news, somebody will come for it, however slow the machine; and who comes first may not be the one
# who must hear it. In tenths of a second.
PATIENCE_ROUNDS = 600
LINGER_ROUNDS = 3


class Setup(msgspec.Struct, frozen=True):
    """What the parent says first: the engine's options, where to listen, and what to remove if the parent dies.

    `options` go through `EngineOptions.from_dict` here: JSON does not keep 3136 and 3136.0 apart, options do.
    """

    options: dict[str, Any]
    socket: str
    scratch: list[str] = []
    log_level: int = logging.INFO


class EngineLike(Protocol):
    """What the loop needs of an engine."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def has_work(self) -> bool: ...

    def add(self, request: AddRequest, pixels: Sequence[Pixels | None]) -> None: ...

    def abort(self, request_id: str) -> bool: ...

    def step(self) -> list[TokenOutput]: ...

    def stats(self) -> EngineStats: ...

    def share(self, room: Room) -> None: ...

    def unshare(self, room: Room) -> None: ...


Loader = Callable[[EngineOptions], tuple[EngineLike, str]]


def load_engine(options: EngineOptions) -> tuple[EngineLike, str]:
    """A ready engine and its final config as JSON. Raises `ConfigError` in words for the operator."""
    wait_asleep(os.environ)
    from qvl.engine.head_start import begin_context, begin_triton
    from qvl.engine.start_clock import StartClock
    from qvl.kernels.compilers import begin_compilers, end_compilers

    clock = StartClock()
    begin_context(options.device)
    begin_compilers(options.device)
    from qvl.engine.config import resolve
    from qvl.engine.device import read_facts

    clock.passed("torch")
    facts = read_facts(options.device)
    clock.passed("device")
    triton = begin_triton() if facts.kind == "cuda" else None
    from qvl.engine.engine import Engine

    config = resolve(options, facts)
    if triton is not None:
        triton.join()
    clock.passed("imports")
    engine = Engine(config, clock=clock)
    end_compilers()
    logger.info("the engine started in %s", clock)
    return engine, engine.config.to_json()


class Loop:
    """Feeds events to the engine, steps it, and sends every output to the one who asked."""

    def __init__(self, engine: EngineLike, hub: Hub, ready: Ready) -> None:
        self._engine = engine
        self._hub = hub
        self._ready = ready
        self._askers: dict[str, Connection] = {}
        self._draining = False
        self._next_numbers = 0.0

    def run(self) -> None:
        """Until drained. Whatever the engine raises here is fatal for the process."""
        while not (self._draining and not self._engine.has_work):
            self._take_events(wait=not self._engine.has_work)
            if self._engine.has_work:
                self._publish(self._engine.step())

    def _take_events(self, wait: bool) -> None:
        """Handle what has arrived; with `wait` sleep until something does."""
        aborted = False
        while wait or not self._hub.events.empty():
            aborted |= self._handle(self._hub.events.get())
            wait = False
        if aborted:
            # No output would tell of it: an aborted request says nothing more.
            self._hub.broadcast(Outputs([], self._engine.stats()))

    def _handle(self, event: Event) -> bool:
        """Act on one event; whether a request was aborted."""
        if isinstance(event, Joined):
            event.connection.send(self._ready)
            return False
        if isinstance(event, Left):
            left = [request_id for request_id, asker in self._askers.items() if asker is event.connection]
            for request_id in left:
                self._abort(request_id)
            for room in event.connection.rooms.values():
                self._engine.unshare(room)
            return bool(left)
        if isinstance(event, Shares):
            self._engine.share(event.room)
            event.room.enter()
            return False
        message = event.message
        if isinstance(message, AddRequest):
            self._add(event, message)
        elif isinstance(message, AbortRequest):
            return self._askers.get(message.request_id) is event.connection and self._abort(message.request_id)
        elif isinstance(message, Drain):
            self._draining = True
        return False

    def _add(self, event: Received, request: AddRequest) -> None:
        reason = "the engine is shutting down" if self._draining else None
        if request.request_id in self._askers:
            reason = "a request of this id is already running"
        if reason is None:
            try:
                self._engine.add(request, event.pixels)
                self._askers[request.request_id] = event.connection
            except QvlError as error:
                reason = error.message
        if reason is not None:
            event.connection.send(refusal(request.request_id, reason))

    def _abort(self, request_id: str) -> bool:
        self._askers.pop(request_id)
        self._engine.abort(request_id)
        return True

    def _publish(self, outputs: Iterable[TokenOutput]) -> None:
        """One frame per asker and step; the others hear the numbers now and then, and when the engine falls idle."""
        by_asker: dict[Connection, list[TokenOutput]] = {}
        for output in outputs:
            asker = self._askers.get(output.request_id)
            if asker is not None:
                by_asker.setdefault(asker, []).append(output)
            if output.finish_reason is not None:
                self._askers.pop(output.request_id, None)
        stats = self._engine.stats()
        for asker, its_outputs in by_asker.items():
            asker.send(Outputs(its_outputs, stats))
        now = time.monotonic()
        if now >= self._next_numbers or not self._engine.has_work:
            self._next_numbers = now + NUMBERS_EVERY_SECONDS
            for connection in tuple(self._hub.connections - by_asker.keys()):
                connection.send(Outputs([], stats))


def listen(path: str) -> socket.socket:
    """A listening unix socket that only this user can reach (its folder is private too)."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(256)  # while a library loads, nobody may come to the door for seconds
    return listener


def serve(setup: Setup, load: Loader, lifeline: int) -> int:
    """Run until drained, failed or orphaned; the exit code."""
    hub = Hub(listen(setup.socket), lifeline, lambda: _leave(setup.scratch))
    hub.start()
    try:
        engine, config = load(EngineOptions.from_dict(setup.options))
    except QvlError as error:
        return _give_up(hub, error.message, EXIT_FAILED)
    except Exception as error:  # the border of the process: the parent must hear what a traceback says
        logger.exception("the engine cannot start")
        return _give_up(hub, f"the engine cannot start: {type(error).__name__}: {error}", EXIT_CRASHED)
    settle(seldom=True)
    try:
        Loop(engine, hub, Ready(engine.info, config)).run()
    except Exception as error:  # the border of the process: a broken device ends it, the parent starts another
        logger.exception("the engine cannot go on")
        return _give_up(hub, f"the engine cannot go on: {type(error).__name__}", EXIT_CRASHED)
    hub.stop()
    return 0


def _give_up(hub: Hub, message: str, code: int) -> int:
    """Tell all who are there, and who come within the next moment, that nothing will come of it."""
    told: set[Connection] = set()
    waiting = threading.Event()
    rounds = PATIENCE_ROUNDS
    while rounds > 0:
        new = hub.connections - told
        for connection in new:
            connection.send(Failed(message))
        told |= new
        rounds = min(rounds, LINGER_ROUNDS) - 1 if told else rounds - 1
        waiting.wait(0.1)
    hub.stop()
    return code


def _leave(scratch: Iterable[str]) -> None:
    """The parent is gone: remove what it can no longer remove, and go without waiting for a step to end."""
    for folder in scratch:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def main(load: Loader = load_engine) -> int:
    # systemd tells every process of a service to end: it is the parent that drains, and that ends this one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    setup = msgspec.json.decode(first_line(sys.stdin.fileno()), type=Setup)
    logging.basicConfig(level=setup.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.setswitchinterval(SWITCH_SECONDS)
    for folder in (Path(setup.socket).parent, *map(Path, setup.scratch)):
        if not folder.is_dir():
            print(f"qvl.engine.worker: no such folder: {folder}", file=sys.stderr)
            return EXIT_FAILED
    return serve(setup, load, sys.stdin.fileno())


def first_line(descriptor: int) -> bytes:
    """Read byte-wise up to the line break: what follows on the descriptor is the lifeline's business."""
    line = bytearray()
    while (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


if __name__ == "__main__":
    # os._exit: nothing is left to be said, and tearing down a device's libraries can take seconds.
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
