"""The seam to whoever answers, and what is to be made of an answer. Knows no transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import msgspec

from qvl import wire
from qvl.errors import QvlError

# done: answered. refused: the line's own fault, recorded. busy: ask again, nobody's fault. broken: ask again, a few
# times. stop: nothing that follows can succeed either.
Verdict: TypeAlias = Literal["done", "refused", "busy", "broken", "stop"]

_BUSY = (429, 503)
_BROKEN = (408, 409, 425)


class NoAnswer(Exception):
    """No answer came. `sent` is False when the request cannot have reached the server."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.message = message
        self.sent = sent


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `retry_after`: seconds that the server asks to wait."""

    status: int
    body: bytes
    request_id: str | None = None
    retry_after: float | None = None

    def error(self) -> QvlError:
        """The error that this stands for."""
        return wire.read_error(self.status, self.body)

    def code(self) -> str:
        """The server's own word for its refusal, else the status."""
        try:
            return _read_refusal(self.body).error.code or str(self.status)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return str(self.status)


class Asker(Protocol):
    """Answers requests on one asyncio loop.

    `where` is for people. `model` goes into bodies that name none. `num_seqs`: how many it works on at once, if known.
    `paths_as_data`: whether pictures of this machine have to travel inside the body.
    """

    where: str
    model: str
    num_seqs: int | None
    paths_as_data: bool

    async def ask(self, url: str, body: bytes) -> Reply:
        """Raises `NoAnswer`."""

    async def close(self) -> None:
        """Gives back what it holds."""


class UsageFields(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class AnswerFields(msgspec.Struct):
    """What the report wants to know of an answer."""

    usage: UsageFields | None = None
    id: str | None = None


class ErrorFields(msgspec.Struct):
    code: str | None = None


class RefusalFields(msgspec.Struct):
    """What the report wants to know of a refusal."""

    error: ErrorFields


_read_refusal = msgspec.json.Decoder(RefusalFields).decode
_read_answer = msgspec.json.Decoder(AnswerFields).decode


def read_answer(body: bytes) -> AnswerFields | None:
    """None when this is not a JSON object, or its counts are none."""
    try:
        if not body.isascii():
            body.decode()  # the decoder does not look into what it skips
        return _read_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def judge(reply: Reply) -> Verdict:
    """What to do about `reply`."""
    if 200 <= reply.status < 300:
        return "done" if read_answer(reply.body) is not None else "broken"
    if reply.status == 401 or (reply.status == 429 and b"insufficient_quota" in reply.body):
        return "stop"
    if reply.status in _BUSY:
        return "busy"
    return "broken" if reply.status >= 500 or reply.status in _BROKEN else "refused"
