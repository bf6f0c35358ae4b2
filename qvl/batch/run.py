"""One batch from its first line to its last: asks, asks again, records; stops only for what would stop every line.

Knows the order of things. How many at once is `pace`'s to say, what an answer is worth `ask`'s, the disk `journal`'s.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from qvl.batch import media
from qvl.batch.ask import Asker, NoAnswer, Reply, judge, read_answer
from qvl.batch.journal import Journal
from qvl.batch.ledger import Ledger, hash_of, scan
from qvl.batch.lines import Defaults, Request, answer_line, error_line, read_id, read_request, shown_id
from qvl.batch.pace import Gate, Limit
from qvl.batch.report import Report
from qvl.batch.source import Source
from qvl.errors import QvlError, RequestFailed, Unavailable

MOST_AT_ONCE = 256
SYNC_SECONDS = 1.0
SHOW_SECONDS = 0.25
PREPARE_HERE_BYTES = 32 * 1024  # longer lines, and lines with pictures, are prepared in a thread
LONGEST_WAIT = 20.0

OpenAsker = Callable[[], Awaitable[Asker]]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How to go about it.

    `concurrency`: None adapts to the server, a number starts there and only gives way to a busy one. `retries`: how
    often a request is asked again whose answer was lost or broken. `patience`: seconds without a single answer, in
    spite of trying, after which the run stops. `retry_failed`: lines that ended in an error are asked again.
    `local_media`: paths in lines name pictures of this machine.
    """

    concurrency: int | None = None
    retries: int = 3
    patience: float = 600.0
    resume: bool = False
    overwrite: bool = False
    retry_failed: bool = False
    local_media: bool = True
    defaults: Defaults = field(default_factory=Defaults)


def _silent(_: str) -> None:
    """Nobody listens."""


async def run_batch(
    source: Source,
    output: Path,
    open_asker: OpenAsker,
    options: BatchOptions = BatchOptions(),
    *,
    show: Callable[[Report, int], None] = lambda report, running: None,
    tell: Tell = _silent,
) -> Report:
    """Answers every line of `source` into `output`, in order. `open_asker` is called when there is something to ask.

    Whatever ends this early, Ctrl-C too, leaves the answers so far beside `output` for `resume`. Raises `QvlError`s
    that concern the whole batch; what concerns one line is recorded in its place.
    """
    journal = Journal(output)
    journal.check(resume=options.resume or options.retry_failed, overwrite=options.overwrite)
    ledger = await asyncio.to_thread(scan, source)
    if source.skipped:
        tell(source.skipped)
    if ledger.num_unreadable:
        tell(f"lines of {source.name} that are not requests and recorded as errors: {ledger.num_unreadable}")
    with journal:
        found = await asyncio.to_thread(
            journal.open, ledger, overwrite=options.overwrite, retry_failed=options.retry_failed
        )
        if found.torn:
            tell(f"{found.torn} torn rows of {journal.part} are asked again")
        report = Report(len(ledger), found.answered, found.failed)
        if found.answered < len(ledger):
            asker = await open_asker()
            try:
                await _Run(source, ledger, journal, asker, options, report, show).run()
            finally:
                await asker.close()
        await asyncio.to_thread(journal.finish, ledger)
    return report


class _Run:
    """The lines that are still to be answered, on their way through one asker."""

    def __init__(
        self,
        source: Source,
        ledger: Ledger,
        journal: Journal,
        asker: Asker,
        options: BatchOptions,
        report: Report,
        show: Callable[[Report, int], None],
    ) -> None:
        self._source, self._ledger, self._journal, self._asker = source, ledger, journal, asker
        self._options, self._report, self._show = options, report, show
        self._gate = Gate(_limit(options.concurrency, asker.num_seqs))
        self._defaults = Defaults(options.defaults.model, {"model": asker.model, **options.defaults.fields})
        localise = media.as_data_urls if asker.paths_as_data else media.as_paths
        self._localise = localise(source.base) if options.local_media else None
        self._tasks: set[asyncio.Future[None]] = set()
        self._failure: BaseException | None = None
        self._ended: asyncio.Event = asyncio.Event()
        self._sleeping = 0
        self._last_answer = 0.0
        self._trouble_since: float | None = None
        report.where = asker.where

    async def run(self) -> None:
        """Returns when all lines have an answer or an error. Raises what ends the whole batch."""
        begin = asyncio.get_running_loop().time()
        watch = [asyncio.ensure_future(self._sync()), asyncio.ensure_future(self._tick())]
        watch[0].add_done_callback(self._end)
        try:
            for index in self._ledger.open_lines():
                while len(self._tasks) >= self._room():
                    await self._one_ended()
                line = asyncio.ensure_future(self._line(int(index)))
                self._tasks.add(line)
                line.add_done_callback(self._end)
            while self._tasks:
                await self._one_ended()
        finally:
            for task in (*watch, *self._tasks):
                task.cancel()
            await asyncio.gather(*watch, *self._tasks, return_exceptions=True)
            self._report.seconds = asyncio.get_running_loop().time() - begin
            self._show(self._report, 0)

    def _room(self) -> int:
        """Lines that may be in memory: those under way, those that wait to be asked again, and some made ready."""
        limit = self._gate.limit.value
        return limit + max(2, limit // 8) + min(self._sleeping, limit)

    async def _one_ended(self) -> None:
        self._ended.clear()
        await self._ended.wait()
        if self._failure is not None:
            raise self._failure

    def _end(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
        self._ended.set()

    async def _line(self, index: int) -> None:
        """One line to its row in the journal."""
        number, mark = int(self._ledger.numbers[index]), self._ledger.mark(index)
        data = self._source.read(int(self._ledger.offsets[index]))
        if self._source.whole and hash_of(data) != int(self._ledger.contents[index]):
            raise QvlError(f"{self._source.name} has changed at line {number} while it was worked on")
        custom_id = _id_of(data, number)
        try:
            request = await self._prepare(data)
            reply, seconds = await self._answer(request)
        except QvlError as error:
            if isinstance(error, _Fatal):
                raise error.error from None
            self._report.add_failure(error.code or "error")
            self._journal.append(self._ledger, index, error_line(mark, custom_id, error))
            return
        self._journal.append(self._ledger, index, answer_line(mark, custom_id, reply))
        self._count(reply, seconds, number, custom_id)

    def _count(self, reply: Reply, seconds: float, number: int, custom_id: str) -> None:
        answer = read_answer(reply.body) if reply.status < 300 else None
        if answer is None:
            self._report.add_failure(reply.code())
            return
        tokens = (answer.usage.prompt_tokens, answer.usage.completion_tokens or 0) if answer.usage else (0, 0)
        self._report.add_answer(seconds, number, custom_id, tokens)

    async def _prepare(self, data: bytes) -> Request:
        work = (data, self._defaults, self._localise)
        if len(data) <= PREPARE_HERE_BYTES and not (self._localise and (b'"image' in data or b'"video' in data)):
            return read_request(*work)
        return await asyncio.to_thread(read_request, *work)

    async def _answer(self, request: Request) -> tuple[Reply, float]:
        """The answer, or the refusal that is to be recorded, and the seconds it took. Raises `QvlError`."""
        loop = asyncio.get_running_loop()
        tries = 0
        while True:
            async with self._gate:
                sent = loop.time()
                self._report.concurrency = max(self._report.concurrency, self._gate.running)
                reply, problem, is_sent = None, "", True
                try:
                    reply = await self._asker.ask(request.url, request.body)
                except NoAnswer as error:
                    problem, is_sent = error.message, error.sent
                verdict = judge(reply) if reply is not None else "broken" if is_sent else "busy"
                if reply is not None and verdict in ("done", "refused"):
                    self._last_answer, self._trouble_since, self._report.trouble = loop.time(), None, ""
                    self._gate.answered()
                    return reply, loop.time() - sent
                self._check_hope(reply, problem, verdict == "stop")
                # Nobody has been answered since: it may be the server that is broken, not this line.
                if verdict == "busy" or self._last_answer < sent:
                    self._gate.busy(sent, reply.retry_after if reply is not None else None)
            self._report.asked_again += 1
            if verdict == "broken":
                tries += 1
                if tries > self._options.retries:
                    self._report.asked_again -= 1
                    return _last_word(reply, problem), loop.time() - sent
                await self._sleep(tries)

    def _check_hope(self, reply: Reply | None, problem: str, stop: bool) -> None:
        """Raises `_Fatal` when nothing that follows can succeed, or nothing has for too long."""
        now = asyncio.get_running_loop().time()
        if stop and reply is not None:
            raise _Fatal(reply.error())
        self._trouble_since = now if self._trouble_since is None else self._trouble_since
        said = self._report.trouble = reply.error().message if reply is not None else problem
        if now - self._trouble_since > self._options.patience:
            seconds = f"{self._options.patience:g} s"
            raise _Fatal(Unavailable(f"{self._asker.where} has answered nothing for {seconds}: {said}"))

    async def _sleep(self, tries: int) -> None:
        self._sleeping += 1
        self._ended.set()  # there is room for another line meanwhile
        try:
            await asyncio.sleep(min(LONGEST_WAIT, 0.25 * 2**tries) * random.uniform(0.5, 1.0))
        finally:
            self._sleeping -= 1

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await asyncio.to_thread(self._journal.sync)

    async def _tick(self) -> None:
        while True:
            self._show(self._report, self._gate.running)
            await asyncio.sleep(SHOW_SECONDS)


class _Fatal(QvlError):
    """`error` ends the whole batch."""

    def __init__(self, error: QvlError) -> None:
        super().__init__(error.message)
        self.error = error


def _limit(concurrency: int | None, num_seqs: int | None) -> Limit:
    if concurrency is not None:
        return Limit(concurrency, fixed=True)
    if num_seqs is not None:  # an engine of our own: full, with some prepared to follow
        return Limit(num_seqs + max(2, num_seqs // 4), fixed=True)
    return Limit(MOST_AT_ONCE)


def _last_word(reply: Reply | None, problem: str) -> Reply:
    """What is recorded of a request that was asked often enough. Raises `RequestFailed` where nothing came back."""
    if reply is None:
        raise RequestFailed(problem)
    if reply.status < 300:
        raise RequestFailed("the server's answer is not understood")
    return reply


def _id_of(data: bytes, number: int) -> str:
    try:
        return shown_id(read_id(data), number)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return shown_id(None, number)
