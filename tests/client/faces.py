"""One face for both clients: what is written once is run through `Client` and through `AsyncClient`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from qvl.client import AsyncClient, Client
from qvl.types import Completion, Delta


class Awaited:
    """`AsyncClient` behind the methods of `Client`, on a loop of its own."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = AsyncClient(*args, **more)

    def chat(self, *args: Any, **more: Any) -> Completion:
        return self._loop.run_until_complete(self._client.chat(*args, **more))

    def ask(self, *args: Any, **more: Any) -> str:
        return self._loop.run_until_complete(self._client.ask(*args, **more))

    def stream(self, *args: Any, **more: Any) -> Iterator[Delta]:
        deltas = self._client.stream(*args, **more)
        try:
            while True:
                try:
                    yield self._loop.run_until_complete(anext(deltas))
                except StopAsyncIteration:
                    return
        finally:
            self._loop.run_until_complete(deltas.aclose())

    def tokens(self, *args: Any) -> int:
        return self._loop.run_until_complete(self._client.tokens(*args))

    def models(self) -> list[str]:
        return self._loop.run_until_complete(self._client.models())

    def ready(self) -> bool:
        return self._loop.run_until_complete(self._client.ready())

    @property
    def model(self) -> str:
        return self._loop.run_until_complete(self._client.model())

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


FACES: tuple[Any, ...] = (Client, Awaited)
