"""`Client`: the calls of `qvl.client.calls`, over blocking sockets. `qvl.client.awaited` is the same, awaited."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from types import TracebackType
from typing import Any

import httpx

from qvl.client.calls import EventReader, Retries, Server, collect, question
from qvl.client.questions import Done, Fetch, Question, Questions, T, advance
from qvl.engine.messages import Dialogue
from qvl.errors import QvlError
from qvl.types import Completion, Delta, PictureRule, SamplingParams


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
        self._questions = Questions(self._server, model)
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
        asked = self._run(self._questions.chat(messages, sampling))
        reader = EventReader()
        with self._server.errors(), closing(self._open(asked)) as response:
            for piece in response.iter_bytes():
                yield from reader.deltas(piece)
        reader.end()

    def ask(self, text: str, *media: Any, system: str | None = None, sampling: SamplingParams | None = None) -> str:
        """The answer to one question about pictures or videos: URLs, paths, bytes, PIL pictures, uint8 arrays
        [h, w, 3] or `MediaPart`s."""
        return self.chat(question(text, media, system), sampling).text

    def tokens(self, messages: Dialogue) -> int:
        """How many tokens the prompt of a conversation has, pictures included. Asks what only qvl servers answer."""
        return self._run(self._questions.tokens(messages))

    def models(self) -> list[str]:
        """The names that the server serves, its main one first."""
        return self._run(self._questions.models())

    def context(self) -> int | None:
        """The most tokens of a request with its answer; None where the server does not say."""
        return self._run(self._questions.context())

    def picture_rule(self) -> PictureRule | None:
        """How the server sees pictures, asked once; None where it does not say."""
        return self._run(self._questions.picture_rule())

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
        return self._run(self._questions.model())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, question: Question[T]) -> T:
        step = advance(question)
        while not isinstance(step, Done):
            try:
                with self._server.errors(), closing(self._open(step)) as response:
                    response.read()
            except QvlError as error:
                step = advance(question, error=error)
            else:
                step = advance(question, response)
        result: T = step.value
        return result

    def _open(self, asked: Fetch) -> httpx.Response:
        """The server's 200, its content not yet read; sent again as `calls` says."""
        attempt = 0
        while True:
            outcome: httpx.Response | Exception
            try:
                outcome = self._http.send(
                    self._http.build_request(asked.method, asked.path, json=asked.body), stream=True
                )
                if outcome.status_code == 200:
                    return outcome
                with closing(outcome):
                    outcome.read()
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                outcome = error
            time.sleep(self._server.wait_or_raise(outcome, attempt))
            attempt += 1
