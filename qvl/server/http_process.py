"""One of several HTTP processes of a server: `python -m qvl.server.http_process`, started by `qvl.server.supervisor`.

It reads one line from standard input, a `Setup` as JSON, listens at the same address as its siblings (the kernel shares
connections out among them) and asks the engine that its parent keeps. Standard input stays open as a lifeline: at its
end the parent is gone, and so is this process at once. The one line on standard output is a `Report`.
Knows how one such process lives. Does not know how many there are.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import msgspec

from qvl.backends.engines import SharedEngine
from qvl.backends.local import LocalBackend
from qvl.engine.garbage import settle
from qvl.engine.options import EngineOptions
from qvl.engine.worker import first_line
from qvl.errors import ConfigError, QvlError
from qvl.media.kept import DEFAULT_BYTES
from qvl.server.counts import Counts, open_table
from qvl.server.door import BACKLOG, bind
from qvl.server.http_setup import Report, Setup
from qvl.server.run import SWITCH_SECONDS, make_server
from qvl.server.start import start_logging


def serve(setup: Setup) -> int:
    """Until told to stop; the exit code."""
    from qvl.server.app import create_app

    options = setup.options
    counts = Counts(open_table(Path(setup.table)), setup.row)
    engine = SharedEngine(setup.socket, [Path(folder) for folder in setup.folders], lambda: counts.engine_restarts)
    # Twice its share of the cores: connections are never shared out evenly, and the cores of others stand idle then.
    cores = max(1, 2 * (os.cpu_count() or 1) // setup.processes)
    backend = LocalBackend(
        EngineOptions.from_dict(setup.engine),
        engine=engine,
        media_cores=cores,
        kept_bytes=DEFAULT_BYTES // setup.processes,
    )
    listener = bind(options, shared=True)
    listener.listen(BACKLOG)

    def started(error: QvlError | None) -> None:
        if error is None:
            settle()
            _tell(Report(info=backend.info))
        else:
            server.start_error = error
            server.should_exit = True

    summaries = Path(setup.table).with_name("summaries")
    server = make_server(create_app(backend, options, started, counts, summaries), options)
    server.run(sockets=[listener])
    if server.start_error is not None:
        raise server.start_error
    return 0


def main() -> int:
    setup = msgspec.json.decode(first_line(sys.stdin.fileno()), type=Setup)
    threading.Thread(target=_end_with_parent, name="qvl-lifeline", daemon=True).start()
    sys.setswitchinterval(SWITCH_SECONDS)
    start_logging(setup.options)
    try:
        return serve(setup)
    except QvlError as error:
        _tell(Report(error=error.message))
        return ConfigError.exit_code


def _tell(report: Report) -> None:
    print(msgspec.json.encode(report).decode(), flush=True)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
