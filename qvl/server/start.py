"""What comes first when a server starts: the engine's process, which takes longest, before HTTP is imported.

Knows the order, and nothing that takes long to import. One HTTP process is `run`, several are `supervisor`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

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
    own.launch()
    try:
        if count > 1:
            from qvl.server.supervisor import supervise

            return supervise(options, engine, own, count)
        from qvl.backends.local import LocalBackend
        from qvl.server.run import run

        return run(options, LocalBackend(engine, engine=own))
    finally:
        own.stop()


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
