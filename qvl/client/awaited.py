"""`AsyncClient`: `qvl.client.blocking`, awaited. Files are read and pictures reduced in worker threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Any

import httpx

from qvl.client.calls import (
    EventReader,
    Retries,
    Server,
    body_of,
    chat_request,
    context_of,
    question,
    read_count,
    read_models,
    rule_of,
    tokens_body,
    wants_rule,
)
from qvl.engine.answers import Collector
from qvl.engine.messages import Dialogue, read_dialogue
from qvl.errors import QvlError
from qvl.types import ChatRequest, Completion, Delta, PictureRule, SamplingParams


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
        self._model = model
        self._served: list[dict[str, Any]] | None = None
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
        request = chat_request(read_dialogue(messages), sampling)
        body = await asyncio.to_thread(body_of, request, await self.model(), await self._rule(request))
        reader = EventReader()
        with self._server.errors():
            response = await self._open("POST", "/v1/chat/completions", body)
            try:
                async for piece in response.aiter_bytes():
                    for delta in reader.deltas(piece):
                        yield delta
            finally:
                await response.aclose()
        reader.end()

    async def ask(
        self, text: str, *media: Any, system: str | None = None, sampling: SamplingParams | None = None
    ) -> str:
        """The answer to one question about pictures or videos: URLs, paths, bytes, PIL pictures, uint8 arrays
        [h, w, 3] or `MediaPart`s."""
        return (await self.chat(question(text, media, system), sampling)).text

    async def tokens(self, messages: Dialogue) -> int:
        """How many tokens the prompt of a conversation has, pictures included. Asks what only qvl servers answer."""
        request = ChatRequest(read_dialogue(messages))
        model, rule = await self.model(), await self._rule(request)
        return read_count(
            await self._whole("POST", "/tokenize", await asyncio.to_thread(tokens_body, request.messages, model, rule))
        )

    async def models(self) -> list[str]:
        """The names that the server serves, its main one first."""
        self._served = read_models(await self._whole("GET", "/v1/models"))
        return [model["id"] for model in self._served]

    async def context(self) -> int | None:
        """The most tokens of a request with its answer; None where the server does not say."""
        model = await self.model()
        if self._served is None:
            await self.models()
        return context_of(self._served or (), model)

    async def picture_rule(self) -> PictureRule | None:
        """How the server sees pictures, asked once; None where it does not say."""
        if self._served is None:
            try:
                await self.models()
            except QvlError:
                self._served = []  # a server without such a list may answer all the same
        return rule_of(self._served or (), await self.model())

    async def ready(self) -> bool:
        """Whether a chat request would be answered now. False too when nothing answers. Asks once."""
        try:
            with self._server.errors():
                return (await self._http.get("/ready")).status_code == 200
        except QvlError:
            return False

    async def model(self) -> str:
        """The model that is asked."""
        if self._model is None:
            await self.models()
            self._model = self._server.first_model(self._served or ())
        return self._model

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _rule(self, request: ChatRequest) -> PictureRule | None:
        return await self.picture_rule() if wants_rule(request) else None

    async def _whole(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        with self._server.errors():
            response = await self._open(method, path, body)
            try:
                await response.aread()
                return response
            finally:
                await response.aclose()

    async def _open(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """The server's 200, its content not yet read; sent again as `calls` says."""
        attempt = 0
        while True:
            outcome: httpx.Response | Exception
            try:
                outcome = await self._http.send(self._http.build_request(method, path, json=body), stream=True)
                if outcome.status_code == 200:
                    return outcome
                try:
                    await outcome.aread()
                finally:
                    await outcome.aclose()
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                outcome = error
            await asyncio.sleep(self._server.wait_or_raise(outcome, attempt))
            attempt += 1
