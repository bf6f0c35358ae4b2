"""What both clients share, free of sockets: requests as JSON, what answers mean, and what is tried again.

A request is sent again only when the server cannot have worked on it: the connection was refused or not made in time,
or the answer was 429 or 503 (the server says that it did not take it; `Retry-After` is kept). Once the request has gone
out and no such answer came, it may have been answered: a broken connection, a time-out, any other status and an error
inside a stream are reported, never repeated.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from qvl import wire
from qvl.client.media import is_local_picture, media_part, portable
from qvl.engine.answers import Collector
from qvl.errors import InvalidRequest, QvlError, RequestFailed, Unavailable
from qvl.types import (
    DEFAULT_URL,
    ChatRequest,
    Completion,
    Delta,
    Message,
    Part,
    PictureRule,
    SamplingParams,
    TextPart,
    check_api_key,
)

CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and after how many seconds a request that was not taken is sent again.

    Waits double from `first_wait`, and are never shorter than the server's `Retry-After`; a server that asks for more
    than `longest_wait` is not waited for.
    """

    count: int = 2
    first_wait: float = 0.25
    longest_wait: float = 30.0

    def wait(self, attempt: int, asked: float) -> float | None:
        """Seconds before the try after `attempt` (from 0), a little more by chance; None to give up."""
        if attempt >= self.count or asked > self.longest_wait:
            return None
        wait = max(asked, min(math.ldexp(self.first_wait, attempt), self.longest_wait))
        return wait * random.uniform(1.0, 1.25)  # so that clients refused together do not come back together


class Server:
    """One server's address, key and rules: what to send, and what its answers mean."""

    def __init__(self, base_url: str | None, api_key: str | None, timeout: float, retries: int | Retries) -> None:
        given = base_url or os.environ.get("QVL_BASE_URL") or DEFAULT_URL
        address = given if "://" in given else f"http://{given}"  # as one types it: localhost:8000
        self.base_url = address.rstrip("/").removesuffix("/v1").rstrip("/")
        key = api_key or os.environ.get("QVL_API_KEY")
        if key:
            check_api_key(key)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.timeout = httpx.Timeout(timeout, connect=CONNECT_SECONDS)
        self.retries = Retries(retries) if isinstance(retries, int) else retries
        # A proxy of the environment is for the wide world; the server stands on this machine unless told otherwise.
        self.trust_env = (urlsplit(self.base_url).hostname or "") not in ("127.0.0.1", "localhost", "::1")

    def wait_or_raise(self, outcome: httpx.Response | Exception, attempt: int) -> float:
        """After a try that brought no answer: seconds to wait before the next, or the error in our words.

        `outcome` is what httpx raised, or an answer other than 200, read.
        """
        asked = 0.0
        if isinstance(outcome, httpx.Response):
            again = outcome.status_code in (429, 503)
            asked = float(_retry_after(outcome) or 0)
        else:
            again = isinstance(outcome, httpx.ConnectError | httpx.ConnectTimeout)
        wait = self.retries.wait(attempt, asked) if again else None
        if wait is not None:
            return wait
        if isinstance(outcome, httpx.Response):
            raise wire.read_error(outcome.status_code, outcome.content, _retry_after(outcome) or 1)
        raise self.explained(outcome) from outcome

    def explained(self, error: Exception) -> QvlError:
        """What httpx raised, in our words."""
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return Unavailable(f"no server answers at {self.base_url}; `qvl serve` starts one")
        if isinstance(error, httpx.TimeoutException):
            return Unavailable(f"the server at {self.base_url} did not answer in time")
        if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
            return InvalidRequest(f"'{self.base_url}' is no address of a server: {error}")
        return Unavailable(f"the connection to {self.base_url} broke: {error}")

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What httpx raises inside, in our words."""
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self.explained(error) from error

    def first_model(self, models: Sequence[Mapping[str, Any]]) -> str:
        """The name of the main one of `read_models`."""
        if not models:
            raise Unavailable(f"the server at {self.base_url} serves no model")
        return str(models[0]["id"])


class EventReader:
    """Server-sent events from bytes, however they were cut by the network. Feed pieces, get each event's JSON.

    Lines end at a line feed only: text that holds U+2028 or a vertical tab stays whole.
    """

    def __init__(self) -> None:
        self._rest = b""
        self.done = False

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """The events that `piece` completes. Raises `RequestFailed` for what is not an event stream of JSON objects."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events: list[dict[str, Any]] = []
        for line in lines:
            field, _, value = line.rstrip(b"\r").partition(b":")
            if field != b"data" or self.done:
                continue
            if value.strip() == b"[DONE]":
                self.done = True
                continue
            events.append(_json_object(value))
        return events

    def deltas(self, piece: bytes) -> Iterator[Delta]:
        """What the events that `piece` completes bring. Raises the error that a server put into its stream."""
        for event in self.feed(piece):
            yield from wire.read_chunk(event)

    def end(self) -> None:
        """The stream has ended. Raises `RequestFailed` when its answer had not."""
        if not self.done:
            raise RequestFailed("the server ended the stream before the answer was complete")


def wants_rule(request: ChatRequest) -> bool:
    """Whether knowing the server's `PictureRule` might make the request smaller."""
    return any(is_local_picture(part) for message in request.messages for part in message.parts)


def body_of(request: ChatRequest, model: str, rule: PictureRule | None = None) -> dict[str, Any]:
    """The JSON body of a streamed chat completion; pictures of this machine travel inside it, reduced by `rule`."""
    body = wire.chat_body(_portable(request, rule), model, True)
    return {**body, "stream_options": {"include_usage": True}}


def tokens_body(messages: tuple[Message, ...], model: str, rule: PictureRule | None = None) -> dict[str, Any]:
    """The JSON body that asks qvl's `/tokenize` for a conversation's tokens."""
    body = wire.chat_body(_portable(ChatRequest(messages), rule), model, False)
    return {"model": model, "messages": body["messages"]}


def read_models(response: httpx.Response) -> list[dict[str, Any]]:
    """The entries of `/v1/models`, the server's main model first."""
    try:
        models = [dict(model) for model in response.json()["data"]]
        return [{**model, "id": str(model["id"])} for model in models]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestFailed("the server's list of models is not understood") from error


def read_count(response: httpx.Response) -> int:
    """The number of tokens in an answer of `/tokenize`."""
    try:
        return int(response.json()["count"])
    except (ValueError, KeyError, TypeError) as error:
        raise RequestFailed("the server's count of tokens is not understood") from error


def rule_of(models: Sequence[Mapping[str, Any]], name: str) -> PictureRule | None:
    """How the model `name` sees pictures, where its server says so (qvl's do)."""
    told = next((model.get("picture") for model in models if model["id"] == name), None)
    try:
        return None if told is None else PictureRule(**{key: int(value) for key, value in told.items()})
    except (TypeError, ValueError, AttributeError):
        return None


def context_of(models: Sequence[Mapping[str, Any]], name: str) -> int | None:
    """The most tokens of a request to the model `name`, where its server says so (qvl's and vLLM's do)."""
    told = next((model.get("max_model_len") for model in models if model["id"] == name), None)
    return told if isinstance(told, int) and told > 0 else None


def collect(deltas: Iterable[Delta]) -> Completion:
    """All answers of a stream, joined; one that never ended has the finish_reason "abort"."""
    collector = Collector()
    for delta in deltas:
        collector.add(delta)
    return collector.completion()


def question(text: str, media: Sequence[Any], system: str | None = None) -> tuple[Message, ...]:
    """The conversation of one question: pictures first, then the text; `system` before it."""
    parts: tuple[Part, ...] = (*map(media_part, media), TextPart(text))
    opening = (Message("system", (TextPart(system),)),) if system is not None else ()
    return (*opening, Message("user", parts))


def chat_request(messages: tuple[Message, ...], sampling: SamplingParams | None) -> ChatRequest:
    """A request with the checkpoint's own sampling where none is given."""
    return ChatRequest(messages, sampling or SamplingParams())


def _portable(request: ChatRequest, rule: PictureRule | None) -> ChatRequest:
    messages = tuple(
        Message(message.role, tuple(portable(part, rule, request.limits) for part in message.parts))
        for message in request.messages
    )
    return dataclasses.replace(request, messages=messages)


def _retry_after(response: httpx.Response) -> int | None:
    wait = response.headers.get("retry-after", "")
    return int(wait) if wait.isdigit() else None


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise RequestFailed("the server sent an event that is not JSON") from error
    if not isinstance(value, dict):
        raise RequestFailed("the server sent an event that is not a JSON object")
    return value
