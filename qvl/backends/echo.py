"""EchoBackend: answers without a model, for the server's own tests and for the CI of applications.

The answer repeats the last user text and counts the media; one character is one token. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import TypeAlias

from qvl.backends.base import BackendInfo, Observer
from qvl.errors import InvalidRequest, PromptTooLong, Unavailable
from qvl.types import (
    ChatRequest,
    CompletionRequest,
    Delta,
    FinishReason,
    MediaPart,
    Message,
    PictureRule,
    SamplingParams,
    TextPart,
    TokenLogprob,
    Usage,
)

TOKENS_PER_MEDIUM = 4
MEDIUM = "\ufffc"  # stands for a quarter of a picture or video among the tokens


class EchoBackend:
    """Repeats what it is told, a character per token, `seconds_per_token` apart (0 still yields to the loop)."""

    def __init__(
        self,
        name: str = "echo",
        *,
        max_model_len: int = 4096,
        max_num_seqs: int = 256,
        seconds_per_token: float = 0.0,
        picture: PictureRule | None = None,
    ) -> None:
        self.observer: Observer | None = None
        self._info = BackendInfo(
            (name,), max_model_len, max_num_seqs, "none", "none", kv_tokens=max_model_len, picture=picture
        )
        self._seconds_per_token = seconds_per_token
        self._started = False
        self._running = 0
        self._aborted = 0

    @property
    def info(self) -> BackendInfo:
        return self._info

    @property
    def not_ready(self) -> str | None:
        return None if self._started else "the backend is not started"

    def launch(self) -> None:
        """There is nothing to load."""

    async def start(self) -> None:
        self._started = True

    async def stop(self) -> None:
        self._started = False

    def chat(self, request: ChatRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        return self._answer(_echo_of(request.messages), _num_tokens(request.messages), request.sampling)

    def complete(self, request: CompletionRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        text = _prompt_text(request)
        return self._answer(text, len(text), request.sampling)

    async def tokenize(self, request: ChatRequest | CompletionRequest) -> Sequence[int]:
        if isinstance(request, CompletionRequest):
            return [ord(char) for char in _prompt_text(request)]
        parts = (part for message in request.messages for part in message.parts)
        texts = (part.text if isinstance(part, TextPart) else MEDIUM * TOKENS_PER_MEDIUM for part in parts)
        token_ids = [ord(char) for text in texts for char in text]
        if len(token_ids) >= self._info.max_model_len:
            raise PromptTooLong(len(token_ids), self._info.max_model_len)
        return token_ids

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return _text_of(token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def stats(self) -> Mapping[str, float]:
        return {"running": self._running, "waiting": 0, "aborted_total": self._aborted}

    async def _answer(self, text: str, prompt_tokens: int, sampling: SamplingParams) -> AsyncGenerator[Delta, None]:
        if prompt_tokens >= self._info.max_model_len:
            raise PromptTooLong(prompt_tokens, self._info.max_model_len)
        room = self._info.max_model_len - prompt_tokens
        steps = list(_steps(text, sampling, min(room, sampling.max_tokens or room)))
        self._running += 1
        ended = False
        completion_tokens = 0
        try:
            for chars, shown, reason, stop in steps:
                await asyncio.sleep(self._seconds_per_token)
                if not self._started:
                    raise Unavailable("the server is shutting down")
                for index in range(sampling.n):
                    completion_tokens += len(chars)
                    yield Delta(
                        index,
                        shown,
                        tuple(map(ord, chars)),
                        _logprobs(chars, sampling),
                        reason,
                        stop,
                        Usage(prompt_tokens, completion_tokens),
                    )
            ended = True
        finally:
            self._running -= 1
            self._aborted += not ended


Step: TypeAlias = tuple[str, str, FinishReason | None, str | None]


def _steps(text: str, sampling: SamplingParams, room: int) -> Iterator[Step]:
    """(characters generated, text shown, finish_reason, stop_reason); the last one has a finish_reason."""
    hits = [(text.find(stop), stop) for stop in sampling.stop if stop in text]
    start, stop = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0])) if hits else (len(text), None)
    generated = text[: start + len(stop)] if stop else text
    if len(generated) > room:
        shown, reason, stop = generated[:room], "length", None
        generated = shown
    else:
        reason = "stop"
        shown = generated if stop is None or sampling.include_stop_str_in_output else generated[:start]
    for char in shown[:-1]:
        yield char, char, None, None
    tail = max(len(shown) - 1, 0)
    yield generated[tail:], shown[tail:], "length" if reason == "length" else "stop", stop


def _echo_of(messages: Sequence[Message]) -> str:
    user = [message for message in messages if message.role == "user"]
    parts = user[-1].parts if user else ()
    text = "".join(part.text for part in parts if isinstance(part, TextPart))
    kinds = Counter(part.kind for message in messages for part in message.parts if isinstance(part, MediaPart))
    counted = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in sorted(kinds.items()))
    return f"{text} [{counted}]" if counted else text


def _num_tokens(messages: Sequence[Message]) -> int:
    parts = [part for message in messages for part in message.parts]
    return sum(len(part.text) if isinstance(part, TextPart) else TOKENS_PER_MEDIUM for part in parts)


def _prompt_text(request: CompletionRequest) -> str:
    return request.prompt if isinstance(request.prompt, str) else _text_of(request.prompt)


def _text_of(token_ids: Sequence[int]) -> str:
    for token_id in token_ids:
        if not 0 <= token_id <= sys.maxunicode or 0xD800 <= token_id <= 0xDFFF:
            raise InvalidRequest(f"token id {token_id} is outside the vocabulary", param="tokens")
    return "".join(map(chr, token_ids))


def _logprobs(chars: str, sampling: SamplingParams) -> tuple[TokenLogprob, ...] | None:
    if sampling.logprobs is None:
        return None
    return tuple(TokenLogprob(ord(char), 0.0, ((ord(char), 0.0),) if sampling.logprobs else ()) for char in chars)
