"""Whether a constraint can be kept to, found out in another process before the engine hears of it.

Knows that trying may take too long or kill who tries (`engine.grammar_worker` says why), and remembers verdicts. Does
not know grammars.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import sys
from collections import OrderedDict
from pathlib import Path

import msgspec

from qvl.engine.protocol import GRAMMARS_READY
from qvl.errors import InvalidRequest, Overloaded, Unavailable
from qvl.types import Constraint

logger = logging.getLogger("qvl.backend")

KEPT_VERDICTS = 1024  # of some hundred bytes each
MOST_WAITING = 16
START_SECONDS = 60.0
WALL_SECONDS = 15.0  # the worker's own limit counts its CPU time, of which a busy machine may give it little


class GrammarCheck:
    """Tries constraints for the checkpoint in `folder`, one after another; the first of them starts the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._asking: set[asyncio.Task[str | None]] = set()

    async def check(self, constraint: Constraint) -> None:
        """Raises `InvalidRequest` naming the field, `Overloaded` when too many wait."""
        key = _key(constraint)
        if key not in self._verdicts:
            if len(self._asking) >= MOST_WAITING:
                raise Overloaded("too many new schemas and grammars wait to be compiled; try again")
            # A caller who leaves must not cut off the conversation with the process.
            asking = asyncio.create_task(self._ask(key, constraint))
            self._asking.add(asking)
            asking.add_done_callback(self._asked)
            verdict = await asyncio.shield(asking)
        else:
            verdict = self._verdicts[key]
            self._verdicts.move_to_end(key)
        if verdict is not None:
            raise InvalidRequest(verdict, param=constraint.param)

    async def close(self) -> None:
        for asking in tuple(self._asking):
            asking.cancel()
        await self._end_process()

    def _asked(self, asking: asyncio.Task[str | None]) -> None:
        self._asking.discard(asking)
        if not asking.cancelled():
            asking.exception()  # heard, even when the caller has left

    async def _ask(self, key: bytes, constraint: Constraint) -> str | None:
        async with self._lock:
            if key not in self._verdicts:
                self._verdicts[key] = await self._try(constraint)
                if len(self._verdicts) > KEPT_VERDICTS:
                    self._verdicts.popitem(last=False)
            return self._verdicts[key]

    async def _try(self, constraint: Constraint) -> str | None:
        """The verdict. Raises `Overloaded` where the process did not even get its seconds of CPU time."""
        process = await self._ready_process()
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        try:
            process.stdin.write(msgspec.json.encode(constraint) + b"\n")
            line = await asyncio.wait_for(process.stdout.readline(), WALL_SECONDS)
        except asyncio.TimeoutError:
            await self._end_process()
            raise Overloaded(f"this machine is too busy to compile '{constraint.param}' now; try again") from None
        except ConnectionError:
            pass  # it has ended, as it does when a limit is reached
        if line:
            return msgspec.json.decode(line, type=str | None)
        await self._end_process()
        logger.warning("a constraint of kind %s took too much to compile and was refused", constraint.kind)
        return f"'{constraint.param}' cannot be kept to: it takes too long or too much memory to compile"

    async def _ready_process(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "qvl.engine.grammar_worker", str(self._folder),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        said = b""
        with contextlib.suppress(asyncio.TimeoutError):
            said = await asyncio.wait_for(process.stdout.readline(), START_SECONDS)
        if said != GRAMMARS_READY:
            await self._end_process()
            raise Unavailable("schemas and grammars cannot be compiled now: the process for it does not start")
        return process

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _key(constraint: Constraint) -> bytes:
    text = "\0".join((constraint.kind, constraint.param, constraint.text))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
