"""Conversations and prompts as a program writes them, with pictures as objects where the wire has addresses.

Knows the short forms that only a program may use; everything else is `qvl.wire`'s, whose checks all apply. Does not
know what a picture is made of: that is found out when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from PIL import Image

from qvl.errors import InvalidRequest, suggest
from qvl.types import MediaKind, MediaPart, Message, TextPart
from qvl.wire import read_messages

# One turn: a `Message`, or a dict in OpenAI's or Qwen's form whose parts may also be plain texts and pictures.
Turn: TypeAlias = Message | Mapping[str, Any]
Dialogue: TypeAlias = str | Sequence[Turn]
# A raw prompt: text, token ids, or vLLM's {"prompt": ..., "multi_modal_data": {"image": ...}}.
RawPrompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]

_PICTURES = (Image.Image, np.ndarray, bytes, bytearray, memoryview, Path)
_RAW_FIELDS = ("prompt", "prompt_token_ids", "multi_modal_data")


def is_one_dialogue(messages: Dialogue | Sequence[Dialogue]) -> bool:
    """Whether these are the turns of one conversation (or its only text), not several conversations."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        return True
    return isinstance(messages[0], Message | Mapping)


def read_dialogue(dialogue: Dialogue) -> tuple[Message, ...]:
    """The turns of one conversation; a text alone is a user's. Raises `InvalidRequest` with the place of a mistake."""
    if isinstance(dialogue, str):
        return (Message("user", (TextPart(dialogue),)),)
    if not isinstance(dialogue, Sequence):
        raise InvalidRequest("'messages' must be a text or a list of messages", param="messages")
    stand_in = {"role": "user", "content": ""}  # keeps the numbers of the turns in what is said about the others
    plain = [stand_in if isinstance(turn, Message) else _long_form(turn) for turn in dialogue]
    read = read_messages(plain, in_process=True)
    return tuple(turn if isinstance(turn, Message) else new for turn, new in zip(dialogue, read, strict=True))


def _long_form(turn: Any) -> Any:
    """The turn with its content as a list of parts. What is no turn goes on to the wire's own complaint."""
    if not isinstance(turn, Mapping):
        return turn
    content = turn.get("content")
    if isinstance(content, _PICTURES):
        content = (content,)
    if not isinstance(content, list | tuple):
        return turn
    return {**turn, "content": [_part(part) for part in content]}


def _part(part: Any) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": part} if isinstance(part, _PICTURES) else part


def is_one_prompt(prompts: RawPrompt | Sequence[RawPrompt]) -> bool:
    """Whether this is one raw prompt, not a list of them."""
    return not isinstance(prompts, Sequence) or not prompts or isinstance(prompts, str) or isinstance(prompts[0], int)


def read_prompt(prompt: RawPrompt) -> tuple[str | list[int], list[MediaPart]]:
    """The text or ids of a raw prompt, and the pictures for its pads in order. Raises `InvalidRequest`."""
    if isinstance(prompt, str):
        return prompt, []
    if isinstance(prompt, Mapping):
        return _read_object(prompt)
    if not isinstance(prompt, Sequence):
        raise InvalidRequest("a prompt must be a text, a list of token ids or an object with 'prompt'", param="prompt")
    return list(cast("Sequence[int]", prompt)), []


def _read_object(prompt: Mapping[str, Any]) -> tuple[str | list[int], list[MediaPart]]:
    for name in prompt:
        if name not in _RAW_FIELDS:
            raise InvalidRequest(f"unknown field '{name}' in a prompt{suggest(str(name), _RAW_FIELDS)}", param="prompt")
    given = [prompt[name] for name in _RAW_FIELDS[:2] if prompt.get(name) is not None]
    if len(given) != 1:
        raise InvalidRequest("a prompt has either 'prompt' or 'prompt_token_ids'", param="prompt")
    media = prompt.get("multi_modal_data") or {}
    return given[0] if isinstance(given[0], str) else list(given[0]), _raw_media(media)


def _raw_media(media: Mapping[str, Any]) -> list[MediaPart]:
    """All pictures, then all videos: which pad gets which is decided by kind."""
    kinds: tuple[MediaKind, ...] = ("image", "video")
    for name in media:
        if name not in kinds:
            hint = suggest(name, kinds)
            raise InvalidRequest(f"unknown kind '{name}' in multi_modal_data{hint}", param="multi_modal_data")
    parts = [MediaPart("image", source) for source in _listed(media.get("image"))]
    return parts + [MediaPart("video", source) for source in _videos(media.get("video"))]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _videos(value: Any) -> list[Any]:
    """A list of pictures is the frames of one video; anything else in a list is a video of its own."""
    listed = _listed(value)
    are_frames = bool(listed) and all(isinstance(v, Image.Image) or getattr(v, "ndim", 0) == 3 for v in listed)
    return [tuple(listed)] if are_frames else listed
