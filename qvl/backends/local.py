"""LocalBackend: answers from an engine process on this machine.

Pictures are fetched, decoded and put into shared files by worker threads, token ids become text here, everything else
is the engine's. No torch in this process. Knows when requests may go to the engine. Does not know where the engine
comes from and what happens when it dies (`engines`), nor how tokens become deltas (`answers`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

import msgspec

from qvl.backends.answers import LiveRequest
from qvl.backends.base import BackendInfo, Observer
from qvl.backends.engines import WORKER, Engine, OwnEngine
from qvl.backends.grammar_check import GrammarCheck
from qvl.backends.preparing import Preparing
from qvl.backends.room import make_room
from qvl.backends.scratch import PixelStore
from qvl.backends.submit import Submission, submission
from qvl.engine.config import EngineConfig
from qvl.engine.intake import Intake, Prepared
from qvl.engine.loading import Loading
from qvl.engine.locate import find_model
from qvl.engine.options import EngineOptions
from qvl.engine.protocol import OWN_FILE, AbortRequest, AddRequest, EngineInfo, EngineStats, Outputs, Ready
from qvl.errors import InvalidRequest, QvlError, Unavailable
from qvl.media.kept import DEFAULT_BYTES
from qvl.media.load import keep_pictures
from qvl.media.stages import heard_by
from qvl.specs import load_spec
from qvl.tokenizer import Tokenizer
from qvl.types import ChatRequest, CompletionRequest, Delta, MediaPart, PictureRule

T = TypeVar("T")
Request = ChatRequest | CompletionRequest

logger = logging.getLogger("qvl.backend")

TEXT_THREADS = 2
# Requests whose pictures are being prepared; most of the threads wait for the network (see `engine.loading`).
MEDIA_THREADS = 64
GAUGES = frozenset(("running", "waiting", "kv_used_fraction", "encoder_cache_bytes"))


class LocalBackend:
    """Serves `options.model` on this machine.

    `command` starts the engine process (another one in tests). `engine`: one that is there already, instead.
    `media_cores`: how many cores pictures may use at a time, by default all. `kept_bytes`: how much of the pictures of
    earlier requests is kept, for those that come again.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        command: Sequence[str] = WORKER,
        engine: Engine | None = None,
        media_cores: int | None = None,
        kept_bytes: int = DEFAULT_BYTES,
    ) -> None:
        self.observer: Observer | None = None
        self._options = options
        self._engine: Engine = engine or OwnEngine(options, command)
        self._name = options.served_model_name or _shown_name(options.model)
        # Texts are encoded one by one: the threads that `tokenizers` keeps for many would only stand about.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Text does not wait behind pictures: a slow download holds a thread for as long as its time-out.
        self._text_pool = ThreadPoolExecutor(TEXT_THREADS, "qvl-text")
        self._media_pool = ThreadPoolExecutor(MEDIA_THREADS, "qvl-media")
        self._loading = Loading(media_cores)
        self._kept_bytes = kept_bytes
        self._store = PixelStore([])
        self._launched = False
        self._live: dict[str, tuple[LiveRequest, int]] = {}
        self._serving: asyncio.Task[None] | None = None
        self._sharing: asyncio.Task[None] | None = None
        self._first: asyncio.Future[None] | None = None
        self._tokenizer: Tokenizer | None = None
        self._intake: Intake | None = None
        self._grammars: GrammarCheck | None = None
        self._engine_info: EngineInfo | None = None
        self._picture: PictureRule | None = None
        self._stats = EngineStats()
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
            picture=self._picture,
        )

    @property
    def not_ready(self) -> str | None:
        return self._reason

    @property
    def engine_pid(self) -> int | None:
        """The engine's process id while it runs."""
        return self._engine.pid

    def launch(self) -> None:
        """Begin what takes long, the engine process, before there is a loop; `start` goes on from there."""
        if not self._launched:
            self._launched = True
            self._reason = "the engine is starting"
            self._engine.launch()
            self._store = PixelStore(list(self._engine.folders))

    async def start(self) -> None:
        self.launch()
        self._first = asyncio.get_running_loop().create_future()
        self._serving = asyncio.create_task(self._serve())
        self._serving.add_done_callback(self._unsupervised)
        try:
            await asyncio.wait((self._first, self._serving), return_when=asyncio.FIRST_COMPLETED)
            await (self._first if self._first.done() else self._serving)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        self._reason = "the server is shutting down"
        self._engine.stop()
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
            self._serving = None
        self._fail_all(Unavailable("the server is shutting down"))
        if self._grammars is not None:
            await self._grammars.close()
        for pool in (self._text_pool, self._media_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        self._loading.close()

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
        return {**named, "restarts_total": self._engine.restarts}

    async def _answer(self, request: Request, request_id: str) -> AsyncGenerator[Delta, None]:
        """Prepare in a thread, hand to the engine, yield what comes back; whatever ends this aborts what still runs."""
        constraint = request.sampling.constraint
        if constraint is not None and self._grammars is not None:
            await self._grammars.check(constraint)
        begun = time.perf_counter()
        preparing = self._preparing(request, request_id)
        adds: Sequence[AddRequest] = ()
        try:
            ready = await preparing.known()
            self._observe("prepare", begun)
            live = LiveRequest(ready.prepared, self._ready_tokenizer(), self._prefix(request))
            if self._reason is not None:
                raise Unavailable(self._reason)
            adds = ready.adds
            for index, add in enumerate(adds):
                self._live[add.request_id] = (live, index)
                self._engine.send(add)
            preparing.used(live.fail)
            sent: float | None = time.perf_counter()
            async with aclosing(live.deltas(lambda index: self._abort(adds[index]))) as deltas:
                async for delta in deltas:
                    if sent is not None:
                        self._observe("first_token", sent)
                        sent = None
                    yield delta
        finally:
            preparing.leave()
            for add in adds:
                self._abort(add)
            if adds:
                self._store.discard(file for file in ready.files if file.ticket == OWN_FILE)

    def _observe(self, stage: str, since: float) -> None:
        if self.observer is not None:
            self.observer.request_stage(stage, time.perf_counter() - since)

    def _abort(self, add: AddRequest) -> None:
        """Tell the engine to forget one answer, unless it has ended by itself."""
        if self._live.pop(add.request_id, None) is not None:
            self._engine.send(AbortRequest(add.request_id))

    async def _in_thread(self, request: Request, work: Callable[[], T]) -> T:
        """`work` in a thread, which is told when this task is cancelled first."""
        if self._reason is not None:
            raise Unavailable(self._reason)
        preparing = Preparing(self._pool_for(request), lambda _: work(), lambda _: None)
        try:
            return await preparing.known()
        finally:
            preparing.leave()

    def _preparing(self, request: Request, request_id: str) -> Preparing[Submission]:
        if self._reason is not None:
            raise Unavailable(self._reason)
        unique = f"{request_id}/{os.getpid()}-{next(self._numbers)}"  # also among processes that share an engine

        def work(announce: Callable[[Submission], None]) -> Submission:
            made = submission(self._prepare(request, later=True), unique, self._store, self.observer)
            if made.promises:
                announce(made)
                made.keep_promises(self._ready_intake())
            return made

        return Preparing(self._pool_for(request), work, lambda made: self._store.discard(made.files))

    def _pool_for(self, request: Request) -> ThreadPoolExecutor:
        return self._media_pool if _has_media(request) else self._text_pool

    def _prepare(self, request: Request, *, later: bool = False) -> Prepared:
        if isinstance(request, CompletionRequest):
            return self._ready_intake().prepare_completion(request)
        with heard_by(None if self.observer is None else self.observer.media_stage):
            return self._ready_intake().prepare_chat(request, later=later)

    def _ready_intake(self) -> Intake:
        assert self._intake is not None
        return self._intake

    def _prefix(self, request: Request) -> str:
        """The prompt itself, where it is asked for in front of the answer."""
        if not isinstance(request, CompletionRequest) or not request.echo:
            return ""
        return request.prompt if isinstance(request.prompt, str) else self._ready_tokenizer().decode(request.prompt)

    def _ready_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise Unavailable(self._reason or "the engine is starting")
        return self._tokenizer

    async def _serve(self) -> None:
        """The engine, for as long as this backend lives. The tokenizer is loaded while the engine's process starts."""
        loop = asyncio.get_running_loop()
        self._tokenizer = await loop.run_in_executor(self._text_pool, self._load_tokenizer)
        await self._engine.run(self)

    def _unsupervised(self, serving: asyncio.Task[None]) -> None:
        """Without a supervisor nothing is started again: that must not look like a short pause."""
        error = None if serving.cancelled() else serving.exception()
        if error is not None and not isinstance(error, QvlError):
            logger.error("the engine is not supervised any more", exc_info=error)
            self._reason = "the engine cannot be started again; the server's log says why"

    def _load_tokenizer(self) -> Tokenizer:
        spec = load_spec(find_model(self._options.model))
        return Tokenizer.from_folder(spec.folder, spec.ids)

    def engine_ready(self, ready: Ready) -> None:
        """Heard from the engine, as are the next two."""
        assert self._tokenizer is not None
        self._engine_info = ready.info
        config = EngineConfig.from_json(ready.config)
        kept = keep_pictures(self._kept_bytes)  # those of an earlier engine lie where it could read them
        self._intake = Intake(config, self._tokenizer, loading=self._loading, kept=kept, empty=self._store.empty)
        if config.device == "cuda":
            self._sharing = asyncio.create_task(self._share_memory(ready))
        self._picture = config.picture_rule
        self._grammars = self._grammars or GrammarCheck(config.spec.folder)
        self._reason = None
        if self._first is not None and not self._first.done():
            self._first.set_result(None)

    async def _share_memory(self, ready: Ready) -> None:
        """With a GPU, which reads it by itself. Until then, and where memory is short, pixels go into files."""
        num_bytes = self._kept_bytes + self._kept_bytes // 2  # those that come again, and those under way
        room = await asyncio.get_running_loop().run_in_executor(self._media_pool, make_room, num_bytes)
        if room is not None and self._reason is None and self._engine_info is ready.info:
            self._engine.send(room.announcement)
            self._store.room = room

    def engine_said(self, outputs: Outputs) -> None:
        """Hot: once per engine step. Waking is all that happens here; text is made by the request's own task."""
        self._stats = outputs.stats
        for output in outputs.outputs:
            found = self._live.get(output.request_id)
            if found is not None:
                found[0].push(found[1], output)
                if output.finish_reason is not None:
                    del self._live[output.request_id]

    def engine_lost(self) -> None:
        self._reason = "the engine process ended and is being started again"
        self._store.room = None
        self._fail_all(Unavailable("the engine process ended while it worked on this request; send it again"))
        self._stats = EngineStats()

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
