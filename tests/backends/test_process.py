"""One life of an engine process, ended from here."""

from __future__ import annotations

import sys
import time
from typing import IO

import pytest

from qvl.backends.process import EngineProcess
from qvl.engine.options import EngineOptions
from tests.server.live import wait_until


class SlowPipe:
    """A pipe whose closing takes so long that its other end has time to act on it."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe

    def close(self) -> None:
        self._pipe.close()
        time.sleep(1.0)


def test_an_engine_that_is_ended_leaves_the_folders_to_the_next(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By itself it removes them when its parent is gone, which is what the end of its lifeline tells it."""
    folder = tmp_path_factory.mktemp("p")
    scratch = folder / "scratch"
    scratch.mkdir()
    command = (sys.executable, "-m", "tests.engine.fake_engine", "slow")
    engine = EngineProcess(command, EngineOptions(model="fake"), str(folder / "s"), [str(scratch)])
    engine.launch()
    assert engine._process is not None and engine._process.stdin is not None
    wait_until((folder / "s").exists, "the engine never listened")
    engine._process.stdin = SlowPipe(engine._process.stdin)  # type: ignore[assignment]
    engine.close()
    engine._process.wait()
    assert scratch.exists()
