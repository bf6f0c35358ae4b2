"""An EchoBackend whose answers stop after their first token until somebody lets them go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from qvl.backends.echo import EchoBackend
from qvl.errors import Unavailable
from qvl.types import ChatRequest, CompletionRequest, Delta


class HeldEcho(EchoBackend):
    """Says one token of each answer, and the rest once `released` says so."""

    def __init__(self, released: Callable[[], bool], *, max_num_seqs: int = 256) -> None:
        super().__init__(max_num_seqs=max_num_seqs)
        self._released = released

    def chat(self, request: ChatRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        return self._held(super().chat(request, request_id))

    def complete(self, request: CompletionRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        return self._held(super().complete(request, request_id))

    async def _held(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta
                while not self._released():
                    await asyncio.sleep(0.01)
                    if self.not_ready is not None:
                        raise Unavailable("the server is shutting down")
