"""What comes first when a server starts: the engine's process, which takes longest, before HTTP is imported.

Knows the order, and nothing that takes long to import. One HTTP process is `run`, several are `supervisor`.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qvl.backends.engines import WORKER, OwnEngine
from qvl.engine.options import EngineOptions
from qvl.errors import ConfigError
from qvl.server.options import ServerOptions

CORES_PER_PROCESS = 4
MOST_BY_DEFAULT = 4


def start(options: ServerOptions, engine: EngineOptions, count: int, command: Sequence[str] = WORKER) -> int:
    """Serve with `count` HTTP processes until told to stop; returns 0. Raises what `run` and `supervise` raise.

    `command` starts the engine.
    """
    start_logging(options)
    own = OwnEngine(engine, command)
    with held_signals() as held:
        own.launch()
        try:
            if count > 1:
                from qvl.server.supervisor import supervise

                return supervise(options, engine, own, count, held)
            from qvl.backends.local import LocalBackend
            from qvl.server.run import run

            return run(options, LocalBackend(engine, engine=own), held)
        finally:
            own.stop()


@contextmanager
def held_signals() -> Iterator[list[int]]:
    """What comes of SIGINT and SIGTERM goes into the list, and nothing else happens, until somebody takes them over.

    There is a second of imports between the engine's start and a server that drains: an exception in the middle of them
    may be lost, and whatever ends the process there leaves the engine's folders behind.
    """
    held: list[int] = []

    def hold(sign: int, frame: FrameType | None) -> None:
        held.append(sign)

    before = {sign: signal.signal(sign, hold) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield held
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def process_count(wish: str, device: str) -> int:
    """How many HTTP processes "auto" or a number means: more than one where a GPU's tokens would keep one core busy.

    Raises `ConfigError`.
    """
    if wish == "auto":
        has_gpu = device.startswith("cuda") or (device == "auto" and Path("/dev/nvidiactl").exists())
        cores = len(os.sched_getaffinity(0))
        return max(1, min(MOST_BY_DEFAULT, cores // CORES_PER_PROCESS)) if has_gpu else 1
    if not wish.isdecimal() or not 1 <= int(wish) <= 64:
        raise ConfigError("--api-server-count must be 'auto' or a number from 1 to 64", param="api_server_count")
    return int(wish)


def start_logging(options: ServerOptions) -> None:
    """Everything goes to standard error."""
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if options.access_log:
        # Asked for by its own flag: it is written whatever the level of everything else.
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
