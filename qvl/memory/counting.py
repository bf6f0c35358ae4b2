"""Exact token counts of conversations, pictures included, without reading the same picture twice.

Knows three ways to count: a qvl server's `/tokenize`, the `usage` of any OpenAI-compatible server, and the tokenizer
and processor of this process. Does not know budgets or windows.
"""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import httpx

from qvl import wire
from qvl.client import body_of
from qvl.errors import RequestFailed, TooManyMedia, Unavailable
from qvl.media.load import load
from qvl.memory.media import media_key
from qvl.memory.steps import AskCall, AsyncAskCall, Messages
from qvl.prompt import Control, Segment, TextRun, Vision, build
from qvl.types import ChatRequest, MediaPart, Message, PixelLimits, SamplingParams

if TYPE_CHECKING:
    from qvl.engine.config import EngineConfig
    from qvl.tokenizer import Tokenizer

MOST_REMEMBERED = 100_000  # pictures; a number each
_TIMEOUT = httpx.Timeout(120.0, connect=5.0)

_Key: TypeAlias = tuple[str, PixelLimits, str]


class TokenCounter(Protocol):
    """Counts as the model does.

    The answer is the number of tokens of the prompt that a chat request with these messages has, with the template, the
    pictures and the opening of the answer. Raises what such a request would raise (`PromptTooLong`, `BadMedia`, ...).
    """

    def __call__(self, messages: Messages, /) -> int: ...


class AsyncTokenCounter(Protocol):
    """`TokenCounter`, awaited."""

    async def __call__(self, messages: Messages, /) -> int: ...


class _PicturesOnce:
    """Counts with every picture and video replaced by a tiny one, plus what each real one takes beyond that.

    Exact, because a picture's pads stand between control tokens, so that nothing around them depends on their number.
    Each picture travels once, however often its conversation is counted. An address is taken to keep its picture.
    """

    def __init__(self) -> None:
        self._extra: dict[_Key, int] = {}

    def counting(self, messages: Messages) -> Generator[Messages, int, int]:
        """Yields conversations to count; returns the count of `messages`."""
        extra = 0
        for message in messages:
            for part in message.parts:
                if isinstance(part, MediaPart):
                    extra += yield from self._measure(part)
        return (yield tuple(map(_with_stand_ins, messages))) + extra

    def _measure(self, part: MediaPart) -> Generator[Messages, int, int]:
        key = (part.kind, part.limits, media_key(part.source))
        if key not in self._extra:
            real = yield (Message("user", (part,)),)
            tiny = yield (Message("user", (_stand_in(part),)),)
            if len(self._extra) >= MOST_REMEMBERED:
                self._extra.clear()
            self._extra[key] = real - tiny
        return self._extra[key]


def _with_stand_ins(message: Message) -> Message:
    parts = tuple(_stand_in(part) if isinstance(part, MediaPart) else part for part in message.parts)
    return replace(message, parts=parts)


def _stand_in(part: MediaPart) -> MediaPart:
    """A tiny picture, or a video of two, under the same bounds: never more tokens than the real one."""
    if part.kind == "image":
        return replace(part, source=_tiny_picture())
    return replace(part, source=(_tiny_picture(),) * 2, limits=replace(part.limits, fps=None, num_frames=None))


@cache
def _tiny_picture() -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (56, 56)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class _TokenizeRoute:
    """`POST /tokenize` of one qvl server: the request, and what its answer says."""

    def __init__(self, base_url: str, model: str | None, api_key: str | None) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.model = model
        key = api_key or os.environ.get("QVL_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def body(self, messages: Messages) -> dict[str, Any]:
        body: dict[str, Any] = {"messages": body_of(ChatRequest(messages), "")["messages"]}
        return body if self.model is None else {**body, "model": self.model}

    def read(self, response: httpx.Response) -> int:
        if response.status_code != 200:
            raise wire.read_error(response.status_code, response.content)
        try:
            return int(response.json()["count"])
        except (ValueError, KeyError, TypeError) as error:
            raise RequestFailed("the server's /tokenize answered something that is not understood") from error

    def unavailable(self, error: httpx.HTTPError) -> Unavailable:
        return Unavailable(f"the server at {self.base_url} did not count tokens: {error or type(error).__name__}")


class ServerCounter:
    """Counts with a qvl server's `/tokenize`. Arguments as `Client`'s. Close it, or use it as a context manager."""

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._route = _TokenizeRoute(base_url, model, api_key)
        self._pictures = _PicturesOnce()
        url, headers = self._route.base_url, self._route.headers
        self._http = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT, transport=transport)

    def __call__(self, messages: Messages, /) -> int:
        counting = self._pictures.counting(messages)
        asked = next(counting)
        while True:
            try:
                response = self._http.post("/tokenize", json=self._route.body(asked))
            except httpx.HTTPError as error:
                raise self._route.unavailable(error) from error
            try:
                asked = counting.send(self._route.read(response))
            except StopIteration as stop:
                return int(stop.value)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> ServerCounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncServerCounter:
    """`ServerCounter`, awaited."""

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._route = _TokenizeRoute(base_url, model, api_key)
        self._pictures = _PicturesOnce()
        url, headers = self._route.base_url, self._route.headers
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=_TIMEOUT, transport=transport)

    async def __call__(self, messages: Messages, /) -> int:
        counting = self._pictures.counting(messages)
        asked = next(counting)
        while True:
            try:
                response = await self._http.post("/tokenize", json=self._route.body(asked))
            except httpx.HTTPError as error:
                raise self._route.unavailable(error) from error
            try:
                asked = counting.send(self._route.read(response))
            except StopIteration as stop:
                return int(stop.value)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncServerCounter:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


_ONE_TOKEN = SamplingParams(max_tokens=1)


class UsageCounter:
    """Counts with any OpenAI-compatible server: asks for one token and reads `usage.prompt_tokens`.

    Costs a prefill per count (prefix caches make it cheap). Servers without `/tokenize` for pictures need it.
    """

    def __init__(self, ask: AskCall) -> None:
        self._ask = ask
        self._pictures = _PicturesOnce()

    def __call__(self, messages: Messages, /) -> int:
        counting = self._pictures.counting(messages)
        asked = next(counting)
        while True:
            tokens = _prompt_tokens(self._ask(asked, _ONE_TOKEN).usage.prompt_tokens)
            try:
                asked = counting.send(tokens)
            except StopIteration as stop:
                return int(stop.value)


class AsyncUsageCounter:
    """`UsageCounter`, awaited."""

    def __init__(self, ask: AsyncAskCall) -> None:
        self._ask = ask
        self._pictures = _PicturesOnce()

    async def __call__(self, messages: Messages, /) -> int:
        counting = self._pictures.counting(messages)
        asked = next(counting)
        while True:
            completion = await self._ask(asked, _ONE_TOKEN)
            tokens = _prompt_tokens(completion.usage.prompt_tokens)
            try:
                asked = counting.send(tokens)
            except StopIteration as stop:
                return int(stop.value)


def _prompt_tokens(told: int) -> int:
    if told < 1:
        raise RequestFailed("the server's answers carry no usage, so tokens cannot be counted with them")
    return told


class LocalCounter:
    """Counts in this process, as the engine of `config` would: `LocalCounter(llm.engine.config, llm.tokenizer)`.

    Reads every picture once and remembers its size. Safe to use from several threads.
    """

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._seen: dict[_Key, Vision] = {}

    def __call__(self, messages: Messages, /) -> int:
        media = [part for message in messages for part in message.parts if isinstance(part, MediaPart)]
        for kind, number in Counter(part.kind for part in media).items():
            limit = self._config.limit_mm_per_prompt.get(kind, 0)
            if number > limit:
                raise TooManyMedia(kind, number, limit)
        waiting = iter(media)
        segments: list[Segment] = [
            piece if isinstance(piece, TextRun | Control) else self._vision(next(waiting))
            for piece in self._tokenizer.chat(messages)
        ]
        ids, merge_size = self._config.spec.ids, self._config.spec.vision.merge_size
        encode = self._tokenizer.encode
        prompt = build(segments, encode, image_pad=ids.image_pad, video_pad=ids.video_pad, merge_size=merge_size)
        return len(prompt.token_ids)

    def _vision(self, part: MediaPart) -> Vision:
        key = (part.kind, part.limits, media_key(part.source))
        if key not in self._seen:
            config = self._config
            one = load(part, config.spec.processor, config.policy, config.limits, resize_here=False)
            if len(self._seen) >= MOST_REMEMBERED:
                self._seen.clear()
            self._seen[key] = Vision(one.kind, one.grid, one.digest)
        return self._seen[key]
