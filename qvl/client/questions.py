"""What a client finds out before it asks, and how its requests are made: steps that both clients run, free of sockets.

A question is a generator: it yields each request that it needs, is given the answer (or thrown the error), and returns
what it found out. Knows what is asked once and remembered. Does not know how requests travel.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import httpx

from qvl.client.calls import (
    Server,
    body_of,
    chat_request,
    context_of,
    read_count,
    read_models,
    rule_of,
    tokens_body,
    wants_rule,
)
from qvl.engine.messages import Dialogue, read_dialogue
from qvl.errors import QvlError
from qvl.types import ChatRequest, PictureRule, SamplingParams

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fetch:
    """To be answered with the server's 200, read."""

    method: str
    path: str
    body: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A generator's result, passed by value: `StopIteration` cannot cross a thread's future."""

    value: Any


Question: TypeAlias = Generator[Fetch, httpx.Response, T]


def advance(steps: Generator[T, Any, Any], answer: Any = None, error: BaseException | None = None) -> T | Done:
    """The next step after `answer` (None at the start), or after `error`."""
    try:
        return steps.send(answer) if error is None else steps.throw(error)
    except StopIteration as stop:
        return Done(stop.value)


class Questions:
    """About one server; `model` is None for its first one."""

    def __init__(self, server: Server, model: str | None) -> None:
        self._server = server
        self._model = model
        self._served: list[dict[str, Any]] | None = None

    def models(self) -> Question[list[str]]:
        self._served = read_models((yield Fetch("GET", "/v1/models")))
        return [model["id"] for model in self._served]

    def model(self) -> Question[str]:
        if self._model is None:
            yield from self.models()
            self._model = self._server.first_model(self._served or ())
        return self._model

    def context(self) -> Question[int | None]:
        model = yield from self.model()
        if self._served is None:
            yield from self.models()
        return context_of(self._served or (), model)

    def picture_rule(self) -> Question[PictureRule | None]:
        if self._served is None:
            try:
                yield from self.models()
            except QvlError:
                self._served = []  # a server without such a list may answer all the same
        return rule_of(self._served or (), (yield from self.model()))

    def chat(self, messages: Dialogue, sampling: SamplingParams | None) -> Question[Fetch]:
        """The request for an answer in a stream."""
        request = chat_request(read_dialogue(messages), sampling)
        model, rule = yield from self._model_and_rule(request)
        return Fetch("POST", "/v1/chat/completions", body_of(request, model, rule))

    def tokens(self, messages: Dialogue) -> Question[int]:
        request = ChatRequest(read_dialogue(messages))
        model, rule = yield from self._model_and_rule(request)
        return read_count((yield Fetch("POST", "/tokenize", tokens_body(request.messages, model, rule))))

    def _model_and_rule(self, request: ChatRequest) -> Question[tuple[str, PictureRule | None]]:
        """How pictures are seen is only asked where something depends on it."""
        model = yield from self.model()
        return model, (yield from self.picture_rule()) if wants_rule(request) else None
