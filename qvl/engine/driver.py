"""Keeps an engine in this process busy for everybody who waits for it.

    reader threads --Prepared--> Driver --AddRequest--> Engine.step --TokenOutput--> each request's deltas

There is no thread of the engine's own: whoever waits for an answer steps the engine, under a lock, and what comes out
is laid where its owner finds it. Knows requests and answers. Does not know messages, sockets or asyncio.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from qvl.engine.answers import Collector, LiveAnswers
from qvl.engine.detokenizer import TokenBytes
from qvl.engine.engine import Engine
from qvl.engine.intake import Prepared
from qvl.engine.progress import Advance, progress_bar
from qvl.engine.protocol import TokenOutput
from qvl.errors import RequestFailed
from qvl.types import Completion, Delta

# Loads the pictures of one request and lays out its prompt; raises `InvalidRequest`.
Reader: TypeAlias = Callable[[], Prepared]

NUM_READERS = 8  # threads that read ahead of the engine
READ_AHEAD = 2 * NUM_READERS  # requests whose pictures wait in memory


@dataclass(slots=True, eq=False)
class _Live:
    """A request in the engine: its answers, and the deltas that its owner has not fetched yet."""

    answers: LiveAnswers
    request_ids: list[str]
    ready: list[Delta] = field(default_factory=list)
    error: RequestFailed | None = None

    @property
    def ended(self) -> bool:
        return self.error is not None or self.answers.num_open == 0


class Driver:
    """Serves prepared requests with `engine`, which nobody else may touch."""

    def __init__(self, engine: Engine, tokenizer: TokenBytes) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._routes: dict[str, tuple[_Live, int]] = {}
        self._numbers = itertools.count()

    def deltas(self, prepared: Prepared) -> Iterator[Delta]:
        """The answers as they grow. The request enters at the first `next`, and is aborted when the iterator is closed.

        Raises `RequestFailed`.
        """
        live = self._submit(prepared)
        try:
            while True:
                ready, ended = self._fetch(live)
                yield from ready
                if live.error is not None:
                    raise live.error
                if ended:
                    return
                self._step(live)
        finally:
            self._forget([live])

    def serve_one(self, reader: Reader) -> Completion:
        """Raises what the reader raises, and `RequestFailed`."""
        collector = Collector()
        for delta in self.deltas(reader()):
            collector.add(delta)
        return collector.completion()

    def serve(self, readers: Sequence[Reader], show_progress: bool) -> list[Completion]:
        """All of them at once, in their order; pictures are read while the engine works.

        Raises what the first bad reader raises, and drops the others then. A request that fails inside the engine gets
        the finish_reason "error", and a warning says why.
        """
        batch = _Batch([Collector() for _ in readers])
        window = 2 * self._engine.config.max_num_seqs
        try:
            with progress_bar(len(readers), show_progress) as advance, _reading_ahead(readers) as ahead:
                while ahead.left or batch.flying:
                    while len(batch.flying) < window and (prepared := ahead.take(wait=not batch.flying)) is not None:
                        batch.flying[ahead.num_taken - 1] = self._submit(prepared)
                    self._step(next(iter(batch.flying.values())))
                    self._gather(batch, advance)
        finally:
            self._forget(list(batch.flying.values()))
        return [collector.completion() for collector in batch.collectors]

    def _gather(self, batch: _Batch, advance: Advance) -> None:
        """Fetch what every request of a batch has ready; those that have ended leave it."""
        for number, live in list(batch.flying.items()):
            ready, ended = self._fetch(live)
            for delta in ready:
                batch.collectors[number].add(delta)
            if live.error is not None:
                warnings.warn(f"request {number}: {live.error.message}", RuntimeWarning, stacklevel=4)
                batch.collectors[number].fail(len(live.request_ids), live.answers.usage)
            if ended:
                del batch.flying[number]
                advance(live.answers.usage.completion_tokens)

    def _submit(self, prepared: Prepared) -> _Live:
        """Hand a request to the engine: one sequence per answer."""
        name = next(self._numbers)
        requests = [prepared.request(f"{name}.{i}", i) for i in range(prepared.sampling.n)]
        answers = LiveAnswers(len(prepared.prompt.token_ids), prepared.sampling, self._tokenizer)
        live = _Live(answers, [request.request_id for request in requests])
        pixels = [media.pixels for media in prepared.media]
        with self._lock:
            for index, request in enumerate(requests):
                self._engine.add(request, pixels)
                self._routes[request.request_id] = (live, index)
        return live

    def _fetch(self, live: _Live) -> tuple[list[Delta], bool]:
        """What is ready, and whether that is all: read together, as another thread may be delivering."""
        with self._lock:
            ready, live.ready = live.ready, []
            return ready, live.ended

    def _step(self, live: _Live) -> None:
        """Run the engine once for everybody, unless another thread has just brought `live` something."""
        with self._lock:
            if not live.ready and not live.ended:
                for output in self._engine.step():
                    self._deliver(output)

    def _deliver(self, output: TokenOutput) -> None:
        found = self._routes.get(output.request_id)
        if found is None:  # its request failed a moment ago, in another answer
            return
        live, index = found
        if output.finish_reason is not None:
            del self._routes[output.request_id]
        try:
            delta = live.answers.take(index, [output])
        except RequestFailed as error:
            live.error = error
            self._abort(live)
            return
        if live.answers.must_abort(index):
            del self._routes[output.request_id]
            self._engine.abort(output.request_id)
        if delta is not None:
            live.ready.append(delta)

    def _forget(self, requests: Sequence[_Live]) -> None:
        with self._lock:
            for live in requests:
                self._abort(live)

    def _abort(self, live: _Live) -> None:
        """End what still runs of a request. The lock is held."""
        for request_id in live.request_ids:
            if self._routes.pop(request_id, None) is not None:
                self._engine.abort(request_id)


@dataclass(slots=True)
class _Batch:
    """Many requests of one caller; `flying` are in the engine, by number."""

    collectors: list[Collector]
    flying: dict[int, _Live] = field(default_factory=dict)


class _Ahead:
    """Runs readers in threads, a few ahead of who takes their results, in order."""

    def __init__(self, readers: Sequence[Reader], pool: ThreadPoolExecutor) -> None:
        self.left = len(readers)
        self.num_taken = 0
        self._readers = iter(readers)
        self._pool = pool
        self._futures: deque[Future[Prepared]] = deque()
        self._start_more()

    def take(self, wait: bool) -> Prepared | None:
        """The next result; None when there is none left, or none yet and `wait` is false.

        Raises what the reader raised.
        """
        if not self._futures or not (wait or self._futures[0].done()):
            return None
        future = self._futures.popleft()
        self._start_more()
        prepared = future.result()
        self.left -= 1
        self.num_taken += 1
        return prepared

    def _start_more(self) -> None:
        for reader in itertools.islice(self._readers, READ_AHEAD - len(self._futures)):
            self._futures.append(self._pool.submit(reader))


@contextmanager
def _reading_ahead(readers: Sequence[Reader]) -> Iterator[_Ahead]:
    pool = ThreadPoolExecutor(NUM_READERS, "qvl-reader")
    try:
        yield _Ahead(readers, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
