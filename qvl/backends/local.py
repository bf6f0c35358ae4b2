"""LocalBackend: answers from an engine process on this machine, started here, watched, and started again when it dies.

Pictures are fetched, decoded and put into shared files by worker threads, token ids become text here, everything else
is the engine's. No torch in this process. Knows when requests may go to the engine. Does not know frames or sockets
(`process`), nor how tokens become deltas (`answers`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

import msgspec

from qvl.backends.answers import LiveRequest
from qvl.backends.base import BackendInfo, Observer
from qvl.backends.process import EngineProcess
from qvl.backends.scratch import PixelStore, ScratchFolder, bases, remove_stale, socket_base
from qvl.backends.submit import Submission, submission
from qvl.engine.config import EngineConfig
from qvl.engine.intake import Intake, Prepared
from qvl.engine.locate import find_model
from qvl.engine.options import EngineOptions
from qvl.engine.protocol import AbortRequest, EngineInfo, EngineStats, Failed, FromEngine, Outputs, Ready
from qvl.errors import ConfigError, InvalidRequest, QvlError, Unavailable
from qvl.media.stages import heard_by
from qvl.specs import load_spec
from qvl.tokenizer import Tokenizer
from qvl.types import ChatRequest, CompletionRequest, Delta, MediaPart

T = TypeVar("T")
Request = ChatRequest | CompletionRequest

logger = logging.getLogger("qvl.backend")

WORKER = (sys.executable, "-m", "qvl.engine.worker")
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 30.0
# An engine that lived this long has not failed at its start: the next pause is the first one again.
STEADY_SECONDS = 60.0
TEXT_THREADS = 2
GAUGES = frozenset(("running", "waiting", "kv_used_fraction", "encoder_cache_bytes"))


class LocalBackend:
    """Serves `options.model` on this machine. `command` starts the engine process (another one in tests)."""

    def __init__(self, options: EngineOptions, *, command: Sequence[str] = WORKER) -> None:
        self.observer: Observer | None = None
        self._options = options
        self._command = command
        self._name = options.served_model_name or _shown_name(options.model)
        # Text does not wait behind pictures: a slow download holds a thread for as long as its time-out.
        self._text_pool = ThreadPoolExecutor(TEXT_THREADS, "qvl-text")
        self._media_pool = ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1) + 4), "qvl-media")
        self._scratch: list[ScratchFolder] = []
        self._sockets: ScratchFolder | None = None
        self._live: dict[str, tuple[LiveRequest, int]] = {}
        self._process: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._tokenizer: Tokenizer | None = None
        self._intake: Intake | None = None
        self._engine_info: EngineInfo | None = None
        self._stats = EngineStats()
        self._restarts = 0
        self._reason: str | None = "the engine is not started"
        self._numbers = itertools.count()

    @property
    def info(self) -> BackendInfo:
        engine = self._engine_info
        if engine is None:
            return BackendInfo((self._name,), 0, 0, "", "")
        return BackendInfo(
            names=(engine.model,),
            max_model_len=engine.max_model_len,
            max_num_seqs=engine.max_num_seqs,
            device=engine.device,
            dtype=engine.dtype,
            attention=engine.attention,
            kv_tokens=engine.kv_tokens,
            load_seconds=engine.load_seconds,
        )

    @property
    def not_ready(self) -> str | None:
        return self._reason

    @property
    def engine_pid(self) -> int | None:
        """The engine's process id while it runs."""
        return None if self._process is None else self._process.pid

    def launch(self) -> None:
        """Begin what takes long, the engine process, before there is a loop; `start` goes on from there."""
        if self._sockets is not None:
            return
        self._reason = "the engine is starting"
        for base in {*bases(), socket_base()}:
            remove_stale(base)
        self._scratch = [ScratchFolder(base) for base in bases()]
        self._sockets = ScratchFolder(socket_base())
        self._store = PixelStore([folder.path for folder in self._scratch])
        self._process = self._new_process()
        self._process.launch()

    async def start(self) -> None:
        self.launch()
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(first))
        self._supervisor.add_done_callback(self._unsupervised)
        try:
            await asyncio.wait((first, self._supervisor), return_when=asyncio.FIRST_COMPLETED)
            await (first if first.done() else self._supervisor)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        self._reason = "the server is shutting down"
        if self._process is not None:
            self._process.close()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
        self._fail_all(Unavailable("the server is shutting down"))
        for pool in (self._text_pool, self._media_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        for folder in (*self._scratch, self._sockets):
            if folder is not None:
                folder.close()

    def chat(self, request: ChatRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        return self._answer(request, request_id)

    def complete(self, request: CompletionRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        return self._answer(request, request_id)

    async def tokenize(self, request: Request) -> Sequence[int]:
        prepared = await self._in_thread(request, lambda: self._prepare(request))
        return prepared.prompt.token_ids

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        tokenizer = self._ready_tokenizer()
        for token_id in token_ids:
            if not 0 <= token_id < tokenizer.vocab_size:
                raise InvalidRequest(f"token id {token_id} is outside the vocabulary", param="tokens")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._text_pool, lambda: tokenizer.decode(token_ids, False))

    def token_bytes(self, token_id: int) -> bytes:
        return self._ready_tokenizer().token_bytes(token_id)

    def stats(self) -> Mapping[str, float]:
        values: dict[str, float] = msgspec.structs.asdict(self._stats)
        named = {name if name in GAUGES else f"{name}_total": value for name, value in values.items()}
        return {**named, "restarts_total": self._restarts}

    async def _answer(self, request: Request, request_id: str) -> AsyncGenerator[Delta, None]:
        """Prepare in a thread, hand to the engine, yield what comes back; whatever ends this aborts what still runs."""
        ready = await self._in_thread(request, lambda: self._submit(request, request_id))
        process = self._process
        live = LiveRequest(ready.prepared, self._ready_tokenizer(), self._prefix(request))
        try:
            if process is None or self._reason is not None:
                raise Unavailable(self._reason or "the engine is not running")
            for index, add in enumerate(ready.adds):
                self._live[add.request_id] = (live, index)
                process.send(add)
            async with aclosing(live.deltas(lambda index: self._abort(ready, index))) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            for index in range(len(ready.adds)):
                self._abort(ready, index)
            self._store.discard(ready.files)

    def _abort(self, ready: Submission, index: int) -> None:
        """Tell the engine to forget one answer, unless it has ended by itself."""
        request_id = ready.adds[index].request_id
        if self._live.pop(request_id, None) is not None and self._process is not None:
            self._process.send(AbortRequest(request_id))

    async def _in_thread(self, request: Request, work: Callable[[], T]) -> T:
        """`work` in a thread. When this task is cancelled first, what the thread still makes is thrown away."""
        if self._reason is not None:
            raise Unavailable(self._reason)
        future = (self._media_pool if _has_media(request) else self._text_pool).submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._throw_away)
            raise

    def _throw_away(self, future: Future[T]) -> None:
        made = None if future.cancelled() or future.exception() is not None else future.result()
        if isinstance(made, Submission):
            self._store.discard(made.files)

    def _prepare(self, request: Request) -> Prepared:
        assert self._intake is not None
        if isinstance(request, CompletionRequest):
            return self._intake.prepare_completion(request)
        with heard_by(None if self.observer is None else self.observer.media_stage):
            return self._intake.prepare_chat(request)

    def _submit(self, request: Request, request_id: str) -> Submission:
        unique = f"{request_id}/{next(self._numbers)}"
        return submission(self._prepare(request), unique, self._store, self.observer)

    def _prefix(self, request: Request) -> str:
        """The prompt itself, where it is asked for in front of the answer."""
        if not isinstance(request, CompletionRequest) or not request.echo:
            return ""
        return request.prompt if isinstance(request.prompt, str) else self._ready_tokenizer().decode(request.prompt)

    def _ready_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise Unavailable(self._reason or "the engine is starting")
        return self._tokenizer

    async def _supervise(self, first: asyncio.Future[None]) -> None:
        """One engine process after another. A first one that cannot start ends it: that is the operator's to mend."""
        pause = FIRST_PAUSE_SECONDS
        loading = asyncio.get_running_loop().run_in_executor(self._text_pool, self._load_tokenizer)
        while True:
            born = time.monotonic()
            failure = await self._one_life(first, loading)
            if not first.done():
                first.set_exception(ConfigError(failure))
                return
            self._restarts += 1
            if time.monotonic() - born > STEADY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            logger.error("%s; starting another in %.1f s", failure, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _unsupervised(self, supervisor: asyncio.Task[None]) -> None:
        """Without a supervisor nothing is started again: that must not look like a short pause."""
        error = None if supervisor.cancelled() else supervisor.exception()
        if error is not None and not isinstance(error, QvlError):
            logger.error("the engine is not supervised any more", exc_info=error)
            self._reason = "the engine cannot be started again; the server's log says why"

    def _load_tokenizer(self) -> Tokenizer:
        spec = load_spec(find_model(self._options.model))
        return Tokenizer.from_folder(spec.folder, spec.ids)

    def _new_process(self) -> EngineProcess:
        assert self._sockets is not None
        folders = [str(folder.path) for folder in (*self._scratch, self._sockets)]
        socket = str(self._sockets.path / f"engine-{self._restarts}")
        return EngineProcess(self._command, self._options, socket, folders)

    async def _one_life(self, first: asyncio.Future[None], loading: asyncio.Future[Tokenizer]) -> str:
        """One engine process to its end; what it died of. Raises `QvlError` when the tokenizer cannot be loaded."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[int] = loop.create_future()
        ready: asyncio.Future[Ready] = loop.create_future()
        last_words: list[str] = []

        def hear(message: FromEngine) -> None:
            if isinstance(message, Outputs):
                self._deliver(message)
            elif isinstance(message, Ready):
                ready.set_result(message)
            elif isinstance(message, Failed):
                last_words.append(message.message)

        def end(code: int) -> None:
            if not ended.done():  # stopped: nobody waits any more
                ended.set_result(code)

        process = self._process or self._new_process()
        self._process = process
        try:
            if process.pid is None:
                process.launch()
            await process.connect(hear, end)
            self._tokenizer = await loading
            await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not ended.done():
                self._become_ready(ready.result(), self._tokenizer)
                if not first.done():
                    first.set_result(None)
            code = await ended
        finally:
            self._process = None
            process.close()
        self._reason = "the engine process ended and is being started again"
        self._fail_all(Unavailable("the engine process ended while it worked on this request; send it again"))
        self._stats = EngineStats()
        return last_words[0] if last_words else f"the engine process ended with exit code {code}"

    def _become_ready(self, ready: Ready, tokenizer: Tokenizer) -> None:
        self._engine_info = ready.info
        self._intake = Intake(EngineConfig.from_json(ready.config), tokenizer)
        self._reason = None

    def _deliver(self, message: Outputs) -> None:
        """Hot: once per engine step. Waking is all that happens here; text is made by the request's own task."""
        self._stats = message.stats
        for output in message.outputs:
            found = self._live.get(output.request_id)
            if found is not None:
                found[0].push(found[1], output)
                if output.finish_reason is not None:
                    del self._live[output.request_id]

    def _fail_all(self, error: QvlError) -> None:
        live, self._live = self._live, {}
        for request, _ in live.values():
            request.fail(error)


def _shown_name(model: str) -> str:
    """What callers may read before the engine has said its name: never a path."""
    folder = Path(model).expanduser()
    is_path = model.startswith((".", "/", "~")) or folder.is_dir()
    return folder.resolve().name if is_path else model


def _has_media(request: Request) -> bool:
    if isinstance(request, CompletionRequest):
        return False
    return any(isinstance(part, MediaPart) for message in request.messages for part in message.parts)
