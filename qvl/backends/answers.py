"""One request on its way through the engine: token outputs go in as they arrive, deltas come out as they are wanted.

A consumer that lags finds everything that has arrived since as one delta, so nothing here costs a task per token, and
what waits is plain integers, bounded by max_tokens. Knows who waits for what. Does not know connections, nor how
outputs become text (`qvl.engine.answers`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from qvl.engine.answers import LiveAnswers
from qvl.engine.intake import Prepared
from qvl.engine.protocol import TokenOutput
from qvl.tokenizer import Tokenizer
from qvl.types import Delta


class LiveRequest:
    """`n` answers to one prompt. `push` and `fail` are called by whoever hears the engine, `deltas` is read once.

    All on one event loop. `prefix` is put in front of every answer's text (an echoed prompt).
    """

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer, prefix: str = "") -> None:
        self._answers = LiveAnswers(len(prepared.prompt.token_ids), prepared.sampling, tokenizer, prefix)
        self._pending: dict[int, list[TokenOutput]] = {}
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, index: int, output: TokenOutput) -> None:
        """What answer `index` gained."""
        pending = self._pending.get(index)
        if pending is None:
            self._pending[index] = [output]
        else:
            pending.append(output)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """No more will come: `deltas` raises `error` once what has arrived is read."""
        self._error = error
        self._wake()

    async def deltas(self, stop: Callable[[int], None]) -> AsyncGenerator[Delta, None]:
        """Deltas until all answers have ended. `stop` is called with an answer that a stop string ended.

        Raises what `fail` was given, and `RequestFailed` when the engine gives one of the answers up.
        """
        while self._answers.num_open:
            if not self._pending:
                await self._more()
            pending, self._pending = self._pending, {}
            for index, outputs in pending.items():
                delta = self._answers.take(index, outputs)
                if self._answers.must_abort(index):
                    stop(index)
                if delta is not None:
                    yield delta

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
