"""One client process: `python -m qvl.bench.load.worker`, started by `qvl.bench.load.run`.

Reads a `Job` from its standard input, draws its prompts, warms the server up, says so, waits for the common start,
sends its share of the load and writes a `Report`; each is one line of JSON. Knows how requests are let go. Does not
know what the other processes do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar

import msgspec

from qvl.bench.load.answer import Outcome, Stopwatch
from qvl.bench.load.cases import Load
from qvl.bench.load.http import Address, HttpError, Pool
from qvl.bench.load.prompts import bodies

CHAT = "/v1/chat/completions"
WARM_UP_TOKENS = 16
WARM_UP_STREAMS = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how it is asked. `options`: fields of every body beside those of the load."""

    address: Address
    model: str
    api_key: str | None = None
    timeout: float = 600.0
    options: dict[str, Any] = field(default_factory=dict)
    tokens_per_word: float = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """The share of process number `index` of `of`: every `of`-th request of the load."""

    target: Target
    load: Load
    warm_up: int
    index: int = 0
    of: int = 1

    @property
    def requests(self) -> range:
        """Which of the load's requests are ours."""
        return range(self.index, self.load.requests, self.of)

    @property
    def streams(self) -> int:
        """How many of them are under way at once, in a closed loop."""
        return share(self.load.concurrency or 0, self.index, self.of)


@dataclass(frozen=True, slots=True)
class Report:
    """What one process did. `cpu_seconds`: its own computing while the load ran."""

    outcomes: list[Outcome]
    begin: float
    end: float
    cpu_seconds: float


def share(total: int, index: int, of: int) -> int:
    """How many of `total` things fall to process `index` when they are dealt out one by one."""
    return len(range(index, total, of))


async def ask(pool: Pool, target: Target, body: bytes, start: float | None = None) -> Outcome:
    """Send one request and time its answer, from `start` or from now."""
    outcome = Outcome(time.perf_counter() if start is None else start)
    watch = Stopwatch(outcome)
    request = target.address.request("POST", CHAT, body, target.api_key)
    try:
        watch.finish(await pool.exchange(request, watch.feed, watch.refuse))
    except HttpError as error:
        outcome.error = outcome.error or str(error)
    return outcome


async def closed_loop(target: Target, requests: Sequence[bytes], streams: int) -> list[Outcome]:
    """Keep `streams` requests under way until all are answered."""
    queue = iter(requests)

    async def stream(pool: Pool) -> list[Outcome]:
        return [await ask(pool, target, body) for body in queue]

    with contextlib.closing(Pool(target.address, target.timeout)) as pool:
        parts = await asyncio.gather(*(stream(pool) for _ in range(streams)))
    return [outcome for part in parts for outcome in part]


async def open_loop(
    target: Target, requests: Sequence[bytes], arrivals: Sequence[float], begin: float
) -> list[Outcome]:
    """Send each request at its time, whatever became of the others.

    Latency counts from that time, not from when we got round to sending: a late client must not flatter the server.
    """
    tasks = []
    with contextlib.closing(Pool(target.address, target.timeout)) as pool:
        for body, arrival in zip(requests, arrivals, strict=True):
            await asyncio.sleep(begin + arrival - time.perf_counter())
            tasks.append(asyncio.ensure_future(ask(pool, target, body, begin + arrival)))
        return await asyncio.gather(*tasks)


async def work(job: Job, tell: Callable[[bytes], None], hear: Callable[[], bytes]) -> Report:
    """Prepare, agree on the start, send the load."""
    target, load = job.target, job.load
    options = {"model": target.model, **target.options}
    words = max(1, round(load.input_tokens / target.tokens_per_word))
    warm_up = dataclasses.replace(
        load, output_tokens=min(load.output_tokens, WARM_UP_TOKENS), name=f"{load.name} warm-up"
    )
    streams = min(WARM_UP_STREAMS, load.concurrency or WARM_UP_STREAMS)
    early = list(bodies(warm_up, range(job.index, job.warm_up, job.of), options, words))
    requests = list(bodies(load, job.requests, options, words))
    await closed_loop(target, early, share(streams, job.index, job.of) or 1)
    tell(b"ready\n")
    begin = float(hear())
    cpu = time.process_time()
    await asyncio.sleep(begin - time.perf_counter())
    if load.rate is None:
        outcomes = await closed_loop(target, requests, job.streams)
    else:
        outcomes = await open_loop(target, requests, load.arrivals()[job.index :: job.of], begin)
    return Report(outcomes, begin, time.perf_counter(), time.process_time() - cpu)


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, on uvloop where it is installed: half the computing for each piece of an answer."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.run(work)
    return uvloop.run(work)


def main(stdin: BinaryIO, stdout: BinaryIO) -> int:
    """The whole process. 1 when the one that started it has gone."""

    def tell(line: bytes) -> None:
        stdout.write(line)
        stdout.flush()

    def hear() -> bytes:
        line = stdin.readline()
        if not line:
            raise EOFError
        return line

    try:
        report = run(work(msgspec.json.decode(hear(), type=Job), tell, hear))
    except EOFError:
        return 1
    tell(msgspec.json.encode(report) + b"\n")
    return 0


if __name__ == "__main__":
    # With PYTHONUNBUFFERED, sys.stdout.buffer may write a part of a long line and leave it at that: a buffer does not.
    # Ctrl-C reaches the one that started us too, and that one tells the user.
    with open(sys.stdout.fileno(), "wb", closefd=False) as whole_lines, contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.stdin.buffer, whole_lines))
