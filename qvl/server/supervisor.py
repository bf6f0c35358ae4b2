"""A server of several HTTP processes: this process owns the engine and them, and answers no request itself.

Each HTTP process has a connection of its own to the engine and a socket of its own at the common address. One that dies
is started again, and so is the engine; a signal drains all of them. Knows lives of processes. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from qvl.backends.base import BackendInfo
from qvl.backends.engines import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, STEADY_SECONDS, OwnEngine
from qvl.engine.options import EngineOptions
from qvl.engine.protocol import Outputs, Ready
from qvl.errors import ConfigError
from qvl.server.counts import Counts, open_table, table_bytes
from qvl.server.door import CLOSE_SECONDS, bind, ready_line, url_of
from qvl.server.http_setup import SHARED_FOLDER, Report, Setup
from qvl.server.options import ServerOptions

logger = logging.getLogger("qvl.server")

HTTP_PROCESS = (sys.executable, "-m", "qvl.server.http_process")
# What a process that drains may need beyond its time before it is taken for stuck.
STUCK_SECONDS = 5.0


def supervise(
    options: ServerOptions, engine: EngineOptions, own: OwnEngine, count: int, held: Sequence[int] = ()
) -> int:
    """Serve with `count` HTTP processes until SIGTERM or SIGINT, or not at all where one of them is `held`; returns 0.

    `own` was launched from `engine`. Raises `ConfigError` when the address cannot be bound or something cannot start.
    """
    # Alone at first: a stranger's socket at this address is an error, not a sibling.
    with bind(options) as alone:
        options = replace(options, port=alone.getsockname()[1])
    with bind(options, shared=True) as holder:  # keeps the port; it never listens, so that it gets no connections
        url = url_of(options, holder)
        print(f"qvl: {count} HTTP processes start on {url}, the model is loading", file=sys.stderr, flush=True)
        return asyncio.run(Supervisor(options, engine, own, count, url).run(held))


class Supervisor:
    """`count` HTTP processes around the engine `own`."""

    def __init__(self, options: ServerOptions, engine: EngineOptions, own: OwnEngine, count: int, url: str) -> None:
        self._options = options
        self._engine_options = engine
        self._engine = own
        self._url = url
        table = own.socket.parent / "table"
        table.write_bytes(bytes(table_bytes(count)))
        self._table = table
        self._rows = [Counts(open_table(table), row) for row in range(count)]
        self._metrics = own.folders[0] / "metrics"
        self._metrics.mkdir()
        self._processes: dict[int, Process] = {}
        self._ready: set[int] = set()
        self._draining = False

    async def run(self, held: Sequence[int]) -> int:
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self._signalled)
        for _ in held:
            self._signalled()
        engine = asyncio.ensure_future(self._engine.run(self))
        everyone = {engine, *(asyncio.ensure_future(self._keep(row)) for row in range(len(self._rows)))}
        running = everyone
        try:
            # The engine's keeping only ends in an error, that of an HTTP process also when it has drained.
            while running != {engine}:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    one.result()
        finally:
            for one in everyone:
                one.cancel()
            await asyncio.gather(*everyone, return_exceptions=True)
            self._engine.stop()
        return 0

    def engine_ready(self, ready: Ready) -> None:
        """The HTTP processes hear of it themselves; this and the next two are what `OwnEngine` tells."""

    def engine_said(self, outputs: Outputs) -> None:
        """Nothing was asked from here."""

    def engine_lost(self) -> None:
        self._rows[0].engine_restarts = self._engine.restarts

    def _signalled(self) -> None:
        """The first signal drains, a second one ends at once: each process knows how."""
        if not self._draining:
            patience = self._options.drain_seconds + CLOSE_SECONDS + STUCK_SECONDS
            asyncio.get_running_loop().call_later(patience, self._signal_all, signal.SIGKILL)
        self._draining = True
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, sign: signal.Signals) -> None:
        for process in self._processes.values():
            _send(process, sign)

    async def _keep(self, row: int) -> None:
        """The HTTP process of `row`, one after another until they drain. Raises when the first one cannot start."""
        pause = FIRST_PAUSE_SECONDS
        while not self._draining:
            born = time.monotonic()
            code = await self._one_life(row)
            self._rows[row].clear()
            if self._draining:
                return
            if row not in self._ready:
                raise ConfigError(f"an HTTP process could not start: it ended with exit code {code}")
            if time.monotonic() - born > STEADY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            logger.error("HTTP process %d ended with exit code %d; starting another in %.1f s", row, code, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _one_life(self, row: int) -> int:
        """One HTTP process to its end; its exit code."""
        setup = msgspec.json.encode(self._setup(row)) + b"\n"
        process = await asyncio.create_subprocess_exec(
            *HTTP_PROCESS,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for the supervisor
            env={**os.environ, SHARED_FOLDER: str(self._metrics)},
        )
        assert process.stdin is not None and process.stdout is not None
        self._processes[row] = process
        if self._draining:  # the signal came while it was being started
            _send(process, signal.SIGTERM)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(setup)
                await process.stdin.drain()
            self._heard(row, await process.stdout.readline())
            return await process.wait()
        finally:
            del self._processes[row]
            _send(process, signal.SIGKILL)
            # Until it is gone and its pipe has ended: asyncio would complain of what is left when its loop is closed.
            await process.stdout.read()
            await process.wait()

    def _heard(self, row: int, line: bytes) -> None:
        """What the process said once; nothing when it ended before."""
        if not line:
            return
        report = msgspec.json.decode(line, type=Report)
        if report.error is not None and row not in self._ready:
            raise ConfigError(report.error)
        if report.info is None:
            return
        first_time = len(self._ready) < len(self._rows)
        self._ready.add(row)
        if first_time and len(self._ready) == len(self._rows):
            self._print_ready(report.info)

    def _print_ready(self, info: BackendInfo) -> None:
        names = self._options.served_model_names
        print(ready_line(self._url + self._options.root_path, info, names), flush=True)

    def _setup(self, row: int) -> Setup:
        """Folders for pixels are new: what the last process of this row had written there, nobody will read."""
        folders = [folder / f"http-{row}" for folder in self._engine.folders]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        return Setup(
            options=self._options,
            engine=msgspec.to_builtins(self._engine_options),
            socket=str(self._engine.socket),
            folders=[str(folder) for folder in folders],
            table=str(self._table),
            row=row,
            processes=len(self._rows),
        )


def _send(process: Process, sign: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(sign)
