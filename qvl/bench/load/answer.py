"""One streamed answer as a stopwatch sees it. Knows server-sent events and the few fields of a chunk that matter."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

LONGEST_ERROR = 300


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are seconds of `time.perf_counter`, which all processes of a machine share.

    `first`: the first token that the client could know of, by its text or, where chunks carry counts, by its count;
    `last`: the last chunk of the answer. `gaps`: seconds between pieces of text.
    `error` is empty when the answer was complete; otherwise the other fields mean nothing.
    """

    start: float
    first: float = 0.0
    last: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    chunks: int = 0
    gaps: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.start

    @property
    def e2e(self) -> float:
        """Seconds to the end of the answer."""
        return self.last - self.start

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for an answer of one token, and for one that came in one piece."""
        return (
            None if self.output_tokens < 2 or self.is_one_piece else (self.last - self.first) / (self.output_tokens - 1)
        )

    @property
    def is_one_piece(self) -> bool:
        """Whether nothing was seen of the answer before its end: its first token's time is not known then."""
        return self.first >= self.last


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Chunk).decode


class Stopwatch:
    """Reads one event stream as it comes, however the network cut it, and fills an `Outcome`."""

    def __init__(self, outcome: Outcome, clock: Callable[[], float] = time.perf_counter) -> None:
        self._outcome = outcome
        self._clock = clock
        self._rest = b""
        self._ended = False
        self._text_at = 0.0
        self._pieces: list[bytes] = []

    def feed(self, piece: bytes) -> None:
        """Bytes of the event stream."""
        now = self._clock()
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and not self._outcome.error:
                self._event(line[5:].strip(), now)

    def refuse(self, piece: bytes) -> None:
        """Bytes of the body of an answer that is no stream."""
        self._pieces.append(piece)

    def finish(self, status: int) -> None:
        """The answer is over: what is missing becomes the outcome's error."""
        outcome = self._outcome
        if status != 200:
            outcome.error = told(status, b"".join(self._pieces))
        elif not outcome.error and not self._ended:
            outcome.error = "the stream ended without [DONE]"
        elif not outcome.error and not outcome.last:
            outcome.error = "the stream held no chunk of an answer"
        # A server that counts no tokens sends one a chunk; an answer without text has its end for a first piece.
        outcome.output_tokens = outcome.output_tokens or outcome.chunks
        outcome.first = outcome.first or outcome.last

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._ended = True
            return
        outcome = self._outcome
        try:
            chunk = _decode(data)
        except msgspec.MsgspecError as error:
            outcome.error = f"an event that is no chunk: {error}"
            return
        if chunk.error and bytes(chunk.error) != b"null":
            outcome.error = told(None, data)
        if chunk.usage is not None:
            outcome.prompt_tokens = chunk.usage.prompt_tokens
            outcome.output_tokens = chunk.usage.completion_tokens
        if not chunk.choices:
            return
        delta = chunk.choices[0].delta
        has_text = bool(delta.content or delta.reasoning_content)
        # A first token may have no text to show yet (half a character): a count in its chunk tells of it all the same.
        if not outcome.first and (has_text or (chunk.usage is not None and chunk.usage.completion_tokens > 0)):
            outcome.first = now
        if has_text:
            if outcome.chunks:
                outcome.gaps.append(now - self._text_at)
            outcome.chunks += 1
            self._text_at = now
        outcome.last = now


def told(status: int | None, body: bytes) -> str:
    """An error body in one line: OpenAI's `error.message` where there is one."""
    try:
        value = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        value = None
    error = value.get("error", value) if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    text = message if isinstance(message, str) else body.decode(errors="replace")
    where = "error in the stream" if status is None else f"HTTP {status}"
    return " ".join(f"{where}: {text}".split())[:LONGEST_ERROR]
