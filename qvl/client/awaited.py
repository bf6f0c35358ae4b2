"""`AsyncClient`: `qvl.client.blocking`, awaited. Files are read and pictures reduced in worker threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Any

import httpx

from qvl.client.calls import EventReader, Retries, Server, question
from qvl.client.questions import Done, Fetch, Question, Questions, T, advance
from qvl.engine.answers import Collector
from qvl.engine.messages import Dialogue
from qvl.errors import QvlError
from qvl.types import Completion, Delta, PictureRule, SamplingParams


class AsyncClient:
    """`Client`, awaited: the same arguments, methods and errors; `model` is a call here. Use it on one event loop."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int | Retries = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._server = Server(base_url, api_key, timeout, retries)
        self.base_url = self._server.base_url
        self._questions = Questions(self._server, model)
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            headers=self._server.headers,
            timeout=self._server.timeout,
            transport=transport,
            trust_env=self._server.trust_env,
        )

    async def chat(self, messages: Dialogue, sampling: SamplingParams | None = None) -> Completion:
        """The whole answer to a conversation: a text, or turns as `Message`s or OpenAI's dicts (`engine.messages`)."""
        collector = Collector()
        async with aclosing(self.stream(messages, sampling)) as deltas:
            async for delta in deltas:
                collector.add(delta)
        return collector.completion()

    async def stream(self, messages: Dialogue, sampling: SamplingParams | None = None) -> AsyncGenerator[Delta, None]:
        """The answer piece by piece. Leaving the loop early ends the work on the server too."""
        asked = await self._run(self._questions.chat(messages, sampling))
        reader = EventReader()
        with self._server.errors():
            async with aclosing(await self._open(asked)) as response:
                async for piece in response.aiter_bytes():
                    for delta in reader.deltas(piece):
                        yield delta
        reader.end()

    async def ask(
        self, text: str, *media: Any, system: str | None = None, sampling: SamplingParams | None = None
    ) -> str:
        """The answer to one question about pictures or videos: URLs, paths, bytes, PIL pictures, uint8 arrays
        [h, w, 3] or `MediaPart`s."""
        return (await self.chat(question(text, media, system), sampling)).text

    async def tokens(self, messages: Dialogue) -> int:
        """How many tokens the prompt of a conversation has, pictures included. Asks what only qvl servers answer."""
        return await self._run(self._questions.tokens(messages))

    async def models(self) -> list[str]:
        """The names that the server serves, its main one first."""
        return await self._run(self._questions.models())

    async def context(self) -> int | None:
        """The most tokens of a request with its answer; None where the server does not say."""
        return await self._run(self._questions.context())

    async def picture_rule(self) -> PictureRule | None:
        """How the server sees pictures, asked once; None where it does not say."""
        return await self._run(self._questions.picture_rule())

    async def ready(self) -> bool:
        """Whether a chat request would be answered now. False too when nothing answers. Asks once."""
        try:
            with self._server.errors():
                return (await self._http.get("/ready")).status_code == 200
        except QvlError:
            return False

    async def model(self) -> str:
        """The model that is asked."""
        return await self._run(self._questions.model())

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, question: Question[T]) -> T:
        step = await asyncio.to_thread(advance, question)
        while not isinstance(step, Done):
            try:
                with self._server.errors():
                    async with aclosing(await self._open(step)) as response:
                        await response.aread()
            except QvlError as error:
                step = await asyncio.to_thread(advance, question, None, error)
            else:
                step = await asyncio.to_thread(advance, question, response)
        result: T = step.value
        return result

    async def _open(self, asked: Fetch) -> httpx.Response:
        """The server's 200, its content not yet read; sent again as `calls` says."""
        attempt = 0
        while True:
            outcome: httpx.Response | Exception
            try:
                outcome = await self._http.send(
                    self._http.build_request(asked.method, asked.path, json=asked.body), stream=True
                )
                if outcome.status_code == 200:
                    return outcome
                async with aclosing(outcome):
                    await outcome.aread()
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                outcome = error
            await asyncio.sleep(self._server.wait_or_raise(outcome, attempt))
            attempt += 1
