"""Conversations as a program writes them: the shapes of the wire, with objects where the wire has addresses.

Knows how objects pass through `qvl.wire`, whose checks all apply. Does not know what a picture is made of: that is said
when it is loaded.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from qvl.errors import InvalidRequest
from qvl.types import MediaPart, Message, Part, TextPart
from qvl.wire.content import read_messages

# One turn: a `Message`, or a dict in OpenAI's or Qwen's form; parts may also be plain texts and pictures.
Turn: TypeAlias = Message | Mapping[str, Any]
Dialogue: TypeAlias = str | Sequence[Turn]

_OBJECTS = (Image.Image, np.ndarray, bytes, bytearray, memoryview, Path)


def is_one_dialogue(messages: Dialogue | Sequence[Dialogue]) -> bool:
    """Whether these are the turns of one conversation (or the text of its only one), not several conversations."""
    return isinstance(messages, str) or not messages or isinstance(messages[0], Message | Mapping)


def read_dialogue(dialogue: Dialogue) -> tuple[Message, ...]:
    """The turns of one conversation. Raises `InvalidRequest` with the place of the first mistake."""
    if isinstance(dialogue, str):
        return (Message("user", (TextPart(dialogue),)),)
    return tuple(turn if isinstance(turn, Message) else turn_of for turn, turn_of in _read_turns(dialogue))


def _read_turns(dialogue: Sequence[Turn]) -> list[tuple[Turn, Message]]:
    """Every turn beside its reading; a `Message` stands for itself."""
    hidden = _Hidden()
    empty = {"role": "user", "content": ""}
    plain = [empty if isinstance(turn, Message) else hidden.turn(turn) for turn in dialogue]
    return [(turn, hidden.restore(read)) for turn, read in zip(dialogue, read_messages(plain), strict=True)]


class _Hidden:
    """Objects that stand as made-up addresses while the text around them is read."""

    def __init__(self) -> None:
        self._prefix = f"object:{secrets.token_hex(8)}:"  # nobody can have typed it
        self._objects: list[Any] = []

    def turn(self, turn: Any) -> Any:
        """The turn with content as the wire has it. What is no turn goes on to the wire's own complaint."""
        if not isinstance(turn, Mapping) or "content" not in turn:
            return turn
        content = turn["content"]
        if isinstance(content, list | tuple):
            content = [self._part(part) for part in content]
        elif isinstance(content, _OBJECTS):
            content = [self._part(content)]
        return {**turn, "content": content}

    def _part(self, part: Any) -> Any:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if isinstance(part, _OBJECTS):
            return {"type": "image", "image": self._hide(part)}
        return self._hide(part)

    def _hide(self, value: Any) -> Any:
        if isinstance(value, _OBJECTS):
            self._objects.append(value)
            return f"{self._prefix}{len(self._objects) - 1}"
        if isinstance(value, Mapping):
            return {key: self._hide(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(inner) for inner in value]
        return value

    def restore(self, message: Message) -> Message:
        return Message(message.role, tuple(self._restore_part(part) for part in message.parts))

    def _restore_part(self, part: Part) -> Part:
        if isinstance(part, TextPart):
            if part.text.startswith(self._prefix):
                raise InvalidRequest("a text part holds a picture; give it as {'type': 'image', 'image': ...}")
            return part
        return MediaPart(part.kind, self._restore(part.source), part.limits)

    def _restore(self, source: Any) -> Any:
        if isinstance(source, tuple):
            return tuple(self._restore(frame) for frame in source)
        if isinstance(source, str) and source.startswith(self._prefix):
            return self._objects[int(source.removeprefix(self._prefix))]
        return source
