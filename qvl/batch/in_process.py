"""Asking without a server: a backend on this event loop, usually an engine that was loaded for this batch.

Knows how a body is answered by a `Backend`. Does not know which backend, nor models.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from qvl import wire
from qvl.backends.base import Backend, collect
from qvl.backends.merge import merge
from qvl.batch.ask import Reply
from qvl.batch.lines import CHAT
from qvl.errors import Overloaded, QvlError

T = TypeVar("T")

PARSE_HERE_BYTES = 32 * 1024


class BackendAsker:
    """Asks `backend`, which must have been started; closing stops it."""

    paths_as_data = False

    def __init__(self, backend: Backend, where: str) -> None:
        self.where = where
        self.model = backend.info.names[0]
        self.num_seqs: int | None = backend.info.max_num_seqs
        self._backend = backend
        self._count = 0

    async def ask(self, url: str, body: bytes) -> Reply:
        self._count += 1
        head_id = f"{'chatcmpl' if url == CHAT else 'cmpl'}-{self._count}"
        try:
            answer = await (self._chat if url == CHAT else self._complete)(body, head_id)
        except QvlError as error:
            wait = float(error.retry_after) if isinstance(error, Overloaded) else None
            return Reply(error.status, msgspec.json.encode(wire.error_body(error)), head_id, wait)
        return Reply(200, answer, head_id)

    async def close(self) -> None:
        await self._backend.stop()

    async def _chat(self, body: bytes, head_id: str) -> bytes:
        call = await _parse(wire.parse_chat, body)
        writer = wire.ChatWriter(self._head(head_id), self._backend.token_bytes, call.options)
        return writer.response(await collect(self._backend.chat(call.request, head_id)))

    async def _complete(self, body: bytes, head_id: str) -> bytes:
        call = await _parse(wire.parse_completion, body)
        writer = wire.CompletionWriter(self._head(head_id), self._backend.token_bytes, call.options)
        streams = [self._backend.complete(one, f"{head_id}-{i}") for i, one in enumerate(call.requests)]
        return writer.response([await collect(merge(streams, call.requests[0].sampling.n))])

    def _head(self, head_id: str) -> wire.Head:
        """Whoever loaded a model for a batch means this one, whatever name the lines were written for."""
        return wire.Head(head_id, self.model, int(time.time()))


async def _parse(parse: Callable[[bytes], T], body: bytes) -> T:
    """Bodies with pictures in them are parsed in a thread: the engine's outputs do not wait."""
    return parse(body) if len(body) <= PARSE_HERE_BYTES else await asyncio.to_thread(parse, body)
