"""What comes out of a store: plain frozen data, and how rows become it. Does not know SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from qvl.memory.media import read_parts
from qvl.memory.schema import fold
from qvl.types import FinishReason, Message, Role, TextPart, Usage

_TITLE_CHARS, _SNIPPET_CHARS = 60, 40


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation as it was written; pictures are `StoredMedia`. `number` counts from 0.

    `usage`, `model` and `finish_reason` belong to answers. `created` is UTC in ISO form.
    """

    id: int
    number: int
    message: Message
    created: str
    model: str | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """A running summary: stands for the turns with numbers below `covers`, takes `tokens` of a prompt."""

    covers: int
    text: str
    tokens: int
    created: str


@dataclass(frozen=True, slots=True)
class Info:
    """One line of a list of conversations; `title` is its name, or how it began. Times are UTC in ISO form."""

    id: str
    name: str
    title: str
    created: str
    updated: str
    num_turns: int


@dataclass(frozen=True, slots=True)
class Hit:
    """A turn that a search found, with the words around the find."""

    conversation_id: str
    title: str
    number: int
    role: Role
    snippet: str
    created: str


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What `forget` removed. `compacted` is False when other processes kept the file from shrinking just now."""

    turns: int
    media: int
    compacted: bool


def read_turn(row: Sequence[Any]) -> Turn:
    """A row of (id, number, role, parts, created, model, finish_reason, prompt, completion and cached tokens)."""
    id, number, role, parts, created, model, finish_reason, prompt, completion, cached = row
    usage = None if prompt is None else Usage(prompt, completion, cached)
    return Turn(id, number, Message(cast(Role, role), read_parts(parts)), created, model, finish_reason, usage)


def plain_text(message: Message) -> str:
    """The texts of a message as they are searched."""
    return fold("\n".join(part.text for part in message.parts if isinstance(part, TextPart)))


def _texts(parts: str | None) -> str:
    return " ".join(part.text for part in read_parts(parts or "[]") if isinstance(part, TextPart))


def opening(parts: str | None) -> str:
    """How a conversation began, on one line."""
    text = " ".join(_texts(parts).split())
    return text if len(text) <= _TITLE_CHARS else f"{text[: _TITLE_CHARS - 1]}…"


def snippet(parts: str, word: str) -> str:
    """The first place of `word` with what stands around it; folding may have moved it by a little."""
    text = " ".join(_texts(parts).split())
    place = max(fold(text).find(word), 0)
    start, end = max(0, place - _SNIPPET_CHARS), place + len(word) + _SNIPPET_CHARS
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
