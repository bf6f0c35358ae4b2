"""One request on its way through the engine: token outputs go in as they arrive, deltas come out as they are wanted.

A consumer that lags finds everything that has arrived since as one delta, so nothing here costs a task per token, and
what waits is plain integers, bounded by max_tokens. Knows text, stop strings and counts. Does not know connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from qvl.engine.detokenizer import Detokenizer
from qvl.engine.intake import Prepared
from qvl.engine.protocol import TokenOutput
from qvl.errors import QvlError, RequestFailed
from qvl.tokenizer import Tokenizer
from qvl.types import Delta, FinishReason, TokenLogprob, Usage


class LiveRequest:
    """`n` answers to one prompt. `push` and `fail` are called by whoever hears the engine, `deltas` is read once.

    All on one event loop. `prefix` is put in front of every answer's text (an echoed prompt).
    """

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer, prefix: str = "") -> None:
        self._prompt_tokens = len(prepared.prompt.token_ids)
        self._answers = [_Answer(prepared, tokenizer, prefix) for _ in range(prepared.sampling.n)]
        self._pending: dict[int, list[TokenOutput]] = {}
        self._error: QvlError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, index: int, output: TokenOutput) -> None:
        """What answer `index` gained."""
        pending = self._pending.get(index)
        if pending is None:
            self._pending[index] = [output]
        else:
            pending.append(output)
        self._wake()

    def fail(self, error: QvlError) -> None:
        """No more will come: `deltas` raises `error` once what has arrived is read."""
        self._error = error
        self._wake()

    async def deltas(self, stop: Callable[[int], None]) -> AsyncGenerator[Delta, None]:
        """Deltas until all answers have ended. `stop` is called with an answer that a stop string ended.

        Raises what `fail` was given, and `RequestFailed` when the engine gives one of the answers up.
        """
        open_answers = len(self._answers)
        while open_answers:
            if not self._pending:
                await self._more()
            pending, self._pending = self._pending, {}
            for index, outputs in pending.items():
                answer = self._answers[index]
                if answer.ended:
                    continue
                gained = answer.take(outputs)
                if answer.stopped:
                    stop(index)
                open_answers -= answer.ended
                if gained is not None:
                    text, token_ids, logprobs, reason, stop_reason = gained
                    yield Delta(index, text, token_ids, logprobs, reason, stop_reason, self._usage())

    def _usage(self) -> Usage:
        generated = sum(answer.num_tokens for answer in self._answers)
        return Usage(self._prompt_tokens, generated, self._answers[0].num_cached_tokens)

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if not self._pending and self._error is not None:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


_Gained = tuple[str, tuple[int, ...], tuple[TokenLogprob, ...] | None, FinishReason | None, str | int | None]


class _Answer:
    """One answer: its text so far is in the detokenizer, its ids without text of their own wait for the next text."""

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer, prefix: str) -> None:
        self._detokenizer = Detokenizer(tokenizer, prepared.sampling)
        self._text = prefix
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if prepared.sampling.logprobs is None else []
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.ended = False
        self.stopped = False

    def take(self, outputs: Sequence[TokenOutput]) -> _Gained | None:
        """What these outputs add; None while there is no text to show for it yet."""
        last = outputs[-1]
        if last.finish_reason == "error":
            raise RequestFailed(last.error or "the engine gave this request up")
        token_ids = last.token_ids if len(outputs) == 1 else [id for output in outputs for id in output.token_ids]
        piece = self._detokenizer.feed(token_ids, last.finish_reason)
        self.num_cached_tokens = max(self.num_cached_tokens, last.num_cached_tokens)
        self.num_tokens += piece.num_tokens
        self._text += piece.text
        self._token_ids += token_ids[: piece.num_tokens]
        self._add_logprobs(outputs, piece.num_tokens)
        reason: FinishReason | None = last.finish_reason
        stop_reason: str | int | None = last.stop_reason
        if piece.stop is not None:
            reason, stop_reason = "stop", piece.stop
            self.stopped = last.finish_reason is None
        self.ended = reason is not None
        return self._gained(reason, stop_reason) if self._text or self.ended else None

    def _gained(self, reason: FinishReason | None, stop_reason: str | int | None) -> _Gained:
        logprobs = None if self._logprobs is None else tuple(self._logprobs)
        gained = self._text, tuple(self._token_ids), logprobs, reason, stop_reason
        self._text, self._token_ids = "", []
        self._logprobs = None if self._logprobs is None else []
        return gained

    def _add_logprobs(self, outputs: Sequence[TokenOutput], count: int) -> None:
        if self._logprobs is not None:
            entries = [entry for output in outputs for entry in output.logprobs or ()]
            self._logprobs += entries[:count]
