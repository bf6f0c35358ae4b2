"""LocalBackends over the fake engine: everything real but the model."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from qvl.backends.local import LocalBackend
from qvl.engine.options import EngineOptions

Start = Callable[..., AbstractAsyncContextManager[LocalBackend]]


@pytest.fixture
def backend_of(checkpoint: Path) -> Start:
    """`async with backend_of("slow") as backend`: started, and stopped at the end."""

    @asynccontextmanager
    async def start(mood: str = "fast", **options: object) -> AsyncIterator[LocalBackend]:
        backend = made(checkpoint, mood, **options)
        await backend.start()
        try:
            yield backend
        finally:
            await backend.stop()

    return start


def made(checkpoint: Path, mood: str, **options: object) -> LocalBackend:
    command = (sys.executable, "-m", "tests.engine.fake_engine", mood)
    known = {"model": str(checkpoint), "device": "cpu", **options}
    return LocalBackend(EngineOptions.from_dict(known), command=command)


async def until(condition: Callable[[], bool], message: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message
        await asyncio.sleep(0.02)
