"""Many items asked about at once, their results in order; and one asked about for a program.

Knows threads, not what is asked. A failing item is an outcome like any other.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from qvl.client import Client, collect, local_server
from qvl.errors import QvlError
from qvl.tasks.base import Ask, Growing, Model, Result, Sighted, Task
from qvl.tasks.inputs import Item, Pages, Reading, items, one_part
from qvl.tasks.pdf import Resolution
from qvl.types import DEFAULT_URL, Completion, Delta, Message, SamplingParams

T = TypeVar("T")

CONCURRENCY = 4
AHEAD = 4  # items under way or waiting to be fetched, per thread: a slow one does not stop the others at once
FAREWELL_SECONDS = 5.0  # for threads to see that nobody waits for them any more


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What came of one item: a result, or the error that kept it from one."""

    item: Item
    result: Result[T] | None = None
    error: QvlError | None = None


class _Stopped(Exception):
    """Nobody waits for the answer any more."""


def each(
    task: Task[T],
    *sources: Any,
    model: Model | None = None,
    pages: str | None = None,
    dpi: float | None = None,
    concurrency: int = CONCURRENCY,
) -> Iterator[Outcome[T]]:
    """The task's outcome for every picture in `sources`, in order: files, folders, PDFs (`pages`, such as "1-3"),
    addresses, bytes, PIL pictures or arrays. `model` is a `Client` or an `LLM`; None as for the functions."""
    model = model or default_model()
    wanted = None if pages is None else Pages.parse(pages)
    resolution = resolution_for(model, dpi)
    return run(task, items(sources, Reading(task.accepts, wanted, lambda: resolution)), model, concurrency=concurrency)


def one(task: Task[T], source: Any, model: Model | None, page: int | None) -> T:
    """The task's value for one picture. What there is to know about it besides is told as a warning."""
    model = model or default_model()
    wanted = None if page is None else Pages(((page, page),))
    part = one_part(source, Reading(task.accepts, wanted, lambda: resolution_for(model)))
    result = task.for_model(model).answer(asking(model), (part,))
    for note in result.notes:
        warnings.warn(note, stacklevel=3)
    return result.value


def default_model() -> Model:
    """The server on this machine (or of QVL_BASE_URL) when it is ready, else the bundled checkpoint, loaded once."""
    if os.environ.get("QVL_BASE_URL"):
        return Client()
    return local_server(DEFAULT_URL, None, None) or _bundled()


@functools.cache
def _bundled() -> Model:
    from qvl.engine.llm import LLM  # torch loads only where no server can answer

    return LLM("demo")


def resolution_for(model: Model, dpi: float | None = None) -> Resolution:
    """How large pages are drawn for a model."""
    if dpi is not None:
        return Resolution(dpi=dpi)
    return Resolution.for_model(model.picture_rule(), model.context()) if isinstance(model, Sighted) else Resolution()


def run(
    task: Task[T],
    found: Iterable[Item],
    model: Model,
    *,
    concurrency: int = CONCURRENCY,
    heard: Callable[[str], None] | None = None,
    shown: Callable[[str], None] | None = None,
) -> Generator[Outcome[T], None, None]:
    """The outcome of every item, in order, with at most `concurrency` asked about at a time.

    `heard` is called with every piece of every answer, from several threads; `shown` with what the text of a result
    will begin with, whenever that has grown: for one item, since it does not say whose. Closing the iterator early
    ends what is still under way.
    """
    stop = threading.Event()
    ask = asking(model, stop, heard, shown)
    task = task.for_model(model)

    def work(item: Item) -> Outcome[T]:
        try:
            return Outcome(item, result=task.answer(ask, (item.load(),)))
        except QvlError as error:
            return Outcome(item, error=error)

    with _threads(concurrency, stop) as submit:
        waiting: deque[Future[Outcome[T]]] = deque()
        for item in found:
            waiting.append(submit(functools.partial(work, item)))
            if len(waiting) >= AHEAD * concurrency:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def asking(
    model: Model,
    stop: threading.Event | None = None,
    heard: Callable[[str], None] | None = None,
    shown: Callable[[str], None] | None = None,
) -> Ask:
    """What a task asks `model` with; once `stop` is set, an answer ends at its next token. `heard` and `shown` as for
    `run`."""

    def followed(deltas: Iterator[Delta], growing: Growing | None) -> Iterator[Delta]:
        answer = ""
        for delta in deltas:
            if stop is not None and stop.is_set():
                raise _Stopped
            if heard is not None:
                heard(delta.text)
            if shown is not None and growing is not None:
                answer += delta.text
                shown(growing(answer))
            yield delta

    def ask(messages: tuple[Message, ...], sampling: SamplingParams, growing: Growing | None = None, /) -> Completion:
        deltas = model.stream(messages, sampling)
        try:
            return collect(followed(deltas, growing))
        finally:
            if isinstance(deltas, Generator):
                deltas.close()  # now, not when the last trace of an error is forgotten: whoever answers can stop

    return ask


@contextmanager
def _threads(count: int, stop: threading.Event) -> Iterator[Callable[[Callable[[], T]], Future[T]]]:
    """A pool whose threads do not keep the program alive: Ctrl-C ends it, whatever they wait for."""
    jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()

    def serve() -> None:
        while (job := jobs.get()) is not None and not stop.is_set():
            future, work = job
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  raised again where the result is awaited
                future.set_exception(error)

    def submit(work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        jobs.put((future, work))
        return future

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield submit
    finally:
        stop.set()
        for _ in threads:
            jobs.put(None)
        for thread in threads:
            thread.join(FAREWELL_SECONDS / count)
