"""`Client`: the calls of `qvl.client.calls`, over blocking sockets. `qvl.client.awaited` is the same, awaited."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from types import TracebackType
from typing import Any

import httpx

from qvl.client.calls import (
    EventReader,
    Retries,
    Server,
    body_of,
    chat_request,
    collect,
    context_of,
    question,
    read_count,
    read_models,
    rule_of,
    tokens_body,
    wants_rule,
)
from qvl.engine.messages import Dialogue, read_dialogue
from qvl.errors import QvlError
from qvl.types import ChatRequest, Completion, Delta, PictureRule, SamplingParams


class Client:
    """Asks one server. Close it, or use it as a context manager.

    `base_url`: the server's root, with or without "/v1"; None reads QVL_BASE_URL, else it is port 8000 of this machine.
    `model`: a name it serves; None asks the server once and takes the first. `api_key`: None reads QVL_API_KEY.
    `timeout`: seconds without a sign of life from the server. `retries`: how often a request is sent again that the
    server did not take (see `qvl.client.calls`). `transport` is for tests. All methods raise `QvlError`s: what the
    server answered, or `Unavailable` when nothing answers.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int | Retries = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._server = Server(base_url, api_key, timeout, retries)
        self.base_url = self._server.base_url
        self._model = model
        self._served: list[dict[str, Any]] | None = None
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=self._server.headers,
            timeout=self._server.timeout,
            transport=transport,
            trust_env=self._server.trust_env,
        )

    def chat(self, messages: Dialogue, sampling: SamplingParams | None = None) -> Completion:
        """The whole answer to a conversation: a text, or turns as `Message`s or OpenAI's dicts (`engine.messages`)."""
        return collect(self.stream(messages, sampling))

    def stream(self, messages: Dialogue, sampling: SamplingParams | None = None) -> Iterator[Delta]:
        """The answer piece by piece. Leaving the loop early ends the work on the server too."""
        request = chat_request(read_dialogue(messages), sampling)
        body = body_of(request, self.model, self._rule(request))
        reader = EventReader()
        with self._server.errors(), closing(self._open("POST", "/v1/chat/completions", body)) as response:
            for piece in response.iter_bytes():
                yield from reader.deltas(piece)
        reader.end()

    def ask(self, text: str, *media: Any, system: str | None = None, sampling: SamplingParams | None = None) -> str:
        """The answer to one question about pictures or videos: URLs, paths, bytes, PIL pictures, uint8 arrays
        [h, w, 3] or `MediaPart`s."""
        return self.chat(question(text, media, system), sampling).text

    def tokens(self, messages: Dialogue) -> int:
        """How many tokens the prompt of a conversation has, pictures included. Asks what only qvl servers answer."""
        request = ChatRequest(read_dialogue(messages))
        body = tokens_body(request.messages, self.model, self._rule(request))
        return read_count(self._whole("POST", "/tokenize", body))

    def models(self) -> list[str]:
        """The names that the server serves, its main one first."""
        self._served = read_models(self._whole("GET", "/v1/models"))
        return [model["id"] for model in self._served]

    def context(self) -> int | None:
        """The most tokens of a request with its answer; None where the server does not say."""
        model = self.model
        if self._served is None:
            self.models()
        return context_of(self._served or (), model)

    def picture_rule(self) -> PictureRule | None:
        """How the server sees pictures, asked once; None where it does not say."""
        if self._served is None:
            try:
                self.models()
            except QvlError:
                self._served = []  # a server without such a list may answer all the same
        return rule_of(self._served or (), self.model)

    def ready(self) -> bool:
        """Whether a chat request would be answered now. False too when nothing answers. Asks once."""
        try:
            with self._server.errors():
                return self._http.get("/ready").status_code == 200
        except QvlError:
            return False

    @property
    def model(self) -> str:
        """The model that is asked."""
        if self._model is None:
            self.models()
            self._model = self._server.first_model(self._served or ())
        return self._model

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rule(self, request: ChatRequest) -> PictureRule | None:
        return self.picture_rule() if wants_rule(request) else None

    def _whole(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        with self._server.errors(), closing(self._open(method, path, body)) as response:
            response.read()
            return response

    def _open(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """The server's 200, its content not yet read; sent again as `calls` says."""
        attempt = 0
        while True:
            outcome: httpx.Response | Exception
            try:
                outcome = self._http.send(self._http.build_request(method, path, json=body), stream=True)
                if outcome.status_code == 200:
                    return outcome
                with closing(outcome):
                    outcome.read()
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                outcome = error
            time.sleep(self._server.wait_or_raise(outcome, attempt))
            attempt += 1
