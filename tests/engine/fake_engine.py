"""An engine without a model, for what surrounds one: `python -m tests.engine.fake_engine MOOD` is its worker process.

A request is answered with its own prompt, one token a step, then one token per medium (97 + its pixels' sum modulo 26),
then END, an end token. MOOD: "refuses" and "breaks" cannot start, "slow" takes 20 ms a step, "fast" none, "held:FILE"
says one token of each answer and the rest once FILE is there, "brief" says four tokens from the middle of the prompt,
"gpu" says that it has one.
Tokens in a prompt: CRASH ends the process, BAD is refused when the request comes, POISON fails it later.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qvl.engine.config import DeviceFacts, resolve
from qvl.engine.options import EngineOptions
from qvl.engine.pixels import Pixels, PromisedPixels, Room
from qvl.engine.protocol import AddRequest, EngineInfo, EngineStats, TokenOutput
from qvl.errors import ConfigError, InvalidRequest
from qvl.types import TokenLogprob

CRASH, BAD, POISON = 600, 601, 602
END = 3
INFO = EngineInfo("fake", "none", "none", "none", 64, 16, 512, 0.0, max_num_seqs=8)
FACTS = DeviceFacts("cpu", (0, 0), 8 << 30, "float32", 1)
GPU = DeviceFacts("cuda", (9, 0), 8 << 30, "float32", 1)


@dataclass
class Running:
    answer: list[int]
    limit: int
    logprobs: bool
    said: int = 0


@dataclass
class FakeEngine:
    seconds_per_step: float = 0.0
    held_until: Path | None = None
    running: dict[str, Running] = field(default_factory=dict)
    aborted: int = 0
    steps: int = 0
    info: EngineInfo = INFO
    brief: bool = False
    waiting: dict[str, tuple[AddRequest, Sequence[Pixels | None]]] = field(default_factory=dict)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: AddRequest, pixels: Sequence[Pixels | None] = ()) -> None:
        if BAD in request.token_ids:
            raise InvalidRequest("a bad token")
        self.waiting[request.request_id] = (request, pixels)
        self.begin_what_has_come()

    def begin_what_has_come(self) -> None:
        for request, pixels in list(self.waiting.values()):
            if all(not isinstance(array, PromisedPixels) or array.is_ready for array in pixels):
                del self.waiting[request.request_id]
                self.begin(request, pixels)

    def begin(self, request: AddRequest, pixels: Sequence[Pixels | None]) -> None:
        sums = [97 + int(array.sum()) % 26 if array is not None else 0 for array in pixels]
        middle = len(request.token_ids) // 2
        said = request.token_ids[middle : middle + 4] if self.brief else request.token_ids
        answer = [*said, *sums, END]
        limit = request.sampling.max_tokens or 10**6
        self.running[request.request_id] = Running(answer, limit, request.sampling.logprobs is not None)

    def abort(self, request_id: str) -> bool:
        self.aborted += 1
        waited = self.waiting.pop(request_id, None) is not None
        return self.running.pop(request_id, None) is not None or waited

    def step(self) -> list[TokenOutput]:
        time.sleep(self.seconds_per_step)
        self.steps += 1
        self.begin_what_has_come()
        if self.held_until is not None and self.held_until.exists():
            self.held_until, self.seconds_per_step = None, 0.0
        held = self.held_until is not None
        return [self._next(name) for name, one in list(self.running.items()) if not held or one.said == 0]

    def _next(self, request_id: str) -> TokenOutput:
        one = self.running[request_id]
        token = one.answer[one.said]
        if token == CRASH:
            raise RuntimeError("the device fell off the bus")
        if token == POISON:
            del self.running[request_id]
            return TokenOutput(request_id, [], finish_reason="error", error="the logits are not numbers")
        one.said += 1
        reason = "stop" if one.said == len(one.answer) else "length" if one.said == one.limit else None
        if reason is not None:
            del self.running[request_id]
        logprobs = [TokenLogprob(token, -0.5)] if one.logprobs else None
        return TokenOutput(request_id, [token], logprobs, finish_reason=reason, num_cached_tokens=2)

    def share(self, room: Room) -> None:
        """What a GPU is told; pixels are read here all the same."""

    def unshare(self, room: Room) -> None:
        """The same."""

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.running), waiting=len(self.waiting), steps=self.steps, aborted=self.aborted)


def load(options: EngineOptions) -> tuple[FakeEngine, str]:
    mood = sys.argv[1]
    if mood == "refuses":
        raise ConfigError("this engine refuses to start")
    if mood == "breaks":
        raise ZeroDivisionError("a bug")
    _, _, gate = mood.partition("held:")
    held_until = Path(gate) if gate else None
    seconds = 0.02 if gate or mood == "slow" else 0.0
    if not Path(options.model).is_dir():
        return FakeEngine(seconds, held_until), '{"fake": true}'
    config = resolve(options, GPU if mood == "gpu" else FACTS)
    info = EngineInfo("fake", "none", "none", "none", 64, 16, config.max_model_len, 0.0, max_num_seqs=8)
    return FakeEngine(seconds, held_until, info=info, brief=mood == "brief"), config.to_json()


if __name__ == "__main__":
    from qvl.engine.worker import main

    code = main(load)
    sys.stderr.flush()
    os._exit(code)
