"""An engine without a model, for what surrounds one: `python -m tests.engine.fake_engine` is a worker process of it.

A request is answered with its own prompt, one token a step, then one token per medium: its pixels' sum modulo 256. The
option `model` sets the mood: "refuses" cannot start, "slow" takes 20 ms a step. CRASH in a prompt ends the process, BAD in a
prompt is refused, and `reuse` of any request's `num_blocks` is not simulated.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from qvl.engine.hub import Pixels
from qvl.engine.options import EngineOptions
from qvl.engine.protocol import AddRequest, EngineInfo, EngineStats, TokenOutput
from qvl.errors import ConfigError, InvalidRequest

CRASH = 666
BAD = 667


@dataclass
class Running:
    answer: list[int]
    limit: int
    said: int = 0


@dataclass
class FakeEngine:
    seconds_per_step: float = 0.0
    running: dict[str, Running] = field(default_factory=dict)
    aborted: int = 0
    steps: int = 0
    info: EngineInfo = EngineInfo("fake", "none", "none", "none", 64, 16, 512, 0.0, max_num_seqs=8)

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, request: AddRequest, pixels: Sequence[Pixels | None] = ()) -> None:
        if BAD in request.token_ids:
            raise InvalidRequest("a bad token")
        sums = [int(array.sum()) % 256 if array is not None else 0 for array in pixels]
        self.running[request.request_id] = Running(request.token_ids + sums, request.sampling.max_tokens or 10**6)

    def abort(self, request_id: str) -> bool:
        self.aborted += 1
        return self.running.pop(request_id, None) is not None

    def step(self) -> list[TokenOutput]:
        time.sleep(self.seconds_per_step)
        self.steps += 1
        return [self._next(request_id) for request_id in list(self.running)]

    def _next(self, request_id: str) -> TokenOutput:
        one = self.running[request_id]
        token = one.answer[one.said]
        if token == CRASH:
            raise RuntimeError("the device fell off the bus")
        one.said += 1
        reason = "stop" if one.said == len(one.answer) else "length" if one.said == one.limit else None
        if reason is not None:
            del self.running[request_id]
        return TokenOutput(request_id, [token], finish_reason=reason)

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.running), steps=self.steps, aborted=self.aborted)


def load(options: EngineOptions) -> tuple[FakeEngine, str]:
    if options.model == "refuses":
        raise ConfigError("this engine refuses to start")
    if options.model == "breaks":
        raise ZeroDivisionError("a bug")
    return FakeEngine(0.02 if options.model == "slow" else 0.0), '{"fake": true}'


if __name__ == "__main__":
    from qvl.engine.worker import main

    code = main(load)
    sys.stderr.flush()
    os._exit(code)
