"""A load against a server: client processes are started, begin together, and what they saw is put together.

Knows processes and clocks. Does not know what a request looks like.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import msgspec

from qvl.bench.load.answer import Outcome, told
from qvl.bench.load.cases import Load
from qvl.bench.load.figures import Figures, summarise
from qvl.bench.load.http import Address, HttpError, Pool, get
from qvl.bench.load.prompts import bodies
from qvl.bench.load.worker import Job, Report, Target, ask, run
from qvl.errors import ConfigError, RequestFailed, Unavailable

WORKER = (sys.executable, "-m", "qvl.bench.load.worker")
MOST_PROCESSES = 4
# Between "all are ready" and the common start: long enough for the last process to hear of it.
START_SECONDS = 0.05
PROBE_SECONDS = 10.0
PROBE_WORDS = (64, 192)
REFUSED = (401, 403)
NAME_IT = "; `qvl bench serve --model NAME` measures without asking"


def default_processes() -> int:
    """Half the cores of this machine (the server may stand on it too), at least 1 and at most 4."""
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))


def connect(
    base_url: str, *, model: str | None, api_key: str | None, timeout: float, options: Mapping[str, Any]
) -> Target:
    """The server at `base_url`: its first model where none is named, and how many tokens one of our words is to it.

    Raises `Unavailable` when nothing answers, `RequestFailed` when it names no model or answers no request,
    `ConfigError` for a time-out that is none.
    """
    if not timeout > 0:
        raise ConfigError(f"the time-out must be above 0 seconds, not {timeout:g}")
    address = Address.read(base_url)
    name = model or _first_model(address, api_key)
    target = Target(address, name, api_key, timeout, dict(options))
    return dataclasses.replace(target, tokens_per_word=_tokens_per_word(target))


def measure(target: Target, load: Load, *, processes: int, warm_up: int, tell: Callable[[str], None]) -> Figures:
    """Put `load` on the server from several processes at once. `warm_up` requests of the same kind go before and count
    for nothing. Raises `RequestFailed` when a client process dies; requests that fail are counted, not raised."""
    number = min(processes, load.requests, load.concurrency or processes)
    with ExitStack() as stack:
        clients = [stack.enter_context(_client()) for _ in range(number)]
        tell(f"{load.name}: preparing {load.requests} requests, {warm_up} to warm up")
        for index, client in enumerate(clients):
            _write(client, msgspec.json.encode(Job(target, load, warm_up, index, number)) + b"\n")
        for client in clients:
            _read(client)
        tell(f"{load.name}: running")
        begin = time.perf_counter() + START_SECONDS
        for client in clients:
            _write(client, b"%r\n" % begin)
        reports = [msgspec.json.decode(_read(client), type=Report) for client in clients]
    outcomes = [outcome for report in reports for outcome in report.outcomes]
    end = max(report.end for report in reports)
    busiest = max(report.cpu_seconds / (report.end - report.begin) for report in reports)
    return summarise(load, outcomes, wall=end - begin, processes=number, client_cpu=busiest)


@contextmanager
def _client() -> Iterator[subprocess.Popen[bytes]]:
    """A client process that does not outlive the block."""
    with subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        try:
            yield client
        finally:
            client.kill()


def _write(client: subprocess.Popen[bytes], line: bytes) -> None:
    assert client.stdin is not None
    try:
        client.stdin.write(line)
        client.stdin.flush()
    except BrokenPipeError:
        raise RequestFailed("a client process died before it began; what it said stands above") from None


def _read(client: subprocess.Popen[bytes]) -> bytes:
    assert client.stdout is not None
    line = client.stdout.readline()
    if not line:
        raise RequestFailed("a client process died; what it said stands above")
    return line


def _first_model(address: Address, api_key: str | None) -> str:
    try:
        status, body = run(get(address, "/v1/models", api_key=api_key, timeout=PROBE_SECONDS))
    except HttpError as error:
        raise Unavailable(f"{error}; `qvl serve` starts a server") from error
    if status != 200:
        raise RequestFailed(f"GET /v1/models: {told(status, body)}{'' if status in REFUSED else NAME_IT}")
    try:
        return str(msgspec.json.decode(body)["data"][0]["id"])
    except (msgspec.DecodeError, LookupError, TypeError):
        raise RequestFailed(f"GET /v1/models names no model{NAME_IT}") from None


def _tokens_per_word(target: Target) -> float:
    """From two prompts of different length, so that the template falls out. 1 where the server counts nothing.

    Raises `RequestFailed` when not even the short one is answered: no load would be.
    """
    loads = [Load("probe", 1, 1, None, count, 1, pictures=0) for count in PROBE_WORDS]
    options = {"model": target.model, **target.options}
    prompts = [next(bodies(load, range(1), options, load.input_tokens)) for load in loads]

    async def probe() -> list[Outcome]:
        with closing(Pool(target.address, target.timeout)) as pool:
            return [await ask(pool, target, body) for body in prompts]

    short, long = run(probe())
    if short.error:
        raise RequestFailed(f"a first request of {PROBE_WORDS[0]} words failed: {short.error}")
    if long.error or long.prompt_tokens <= short.prompt_tokens:
        return 1.0
    return (long.prompt_tokens - short.prompt_tokens) / (PROBE_WORDS[1] - PROBE_WORDS[0])
