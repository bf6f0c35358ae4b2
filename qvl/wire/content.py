"""Messages and their content parts, as OpenAI, Qwen's examples and vLLM write them.

Knows every accepted spelling, and says the right form where one is wrong. Never looks behind an address.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from qvl.errors import InvalidRequest, suggest
from qvl.types import MediaKind, MediaPart, Message, Part, PixelLimits, Role, TextPart

LOW_DETAIL_PIXELS = 512 * 512  # `detail: "low"`: what OpenAI scales such pictures to
MAX_FRAMES = 768
MAX_PARTS = 20_000  # messages and their parts: the chat template takes tens of microseconds for each
MAX_SIDE = 2**16

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
# Fields of a message that may stand there when they say nothing: clients send back what they were given, with fields of
# their own. Null stands for nothing in any field.
_EMPTY_MESSAGE_FIELDS = (
    "refusal",
    "audio",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "annotations",
    "reasoning",
    "reasoning_content",
    "provider_specific_fields",
)
_PICTURE_LIMITS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_LIMITS = (*_PICTURE_LIMITS, "total_pixels", "fps", "num_frames", "nframes")
_EDGES = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}  # of a `size`: they are areas, despite the name
_FIELDS_OF_PART = {
    "text": ("text",),
    "image_url": ("image_url", "detail", *_PICTURE_LIMITS),
    "image": ("image", "url", "detail", *_PICTURE_LIMITS),
    "video_url": ("video_url", *_LIMITS),
    "video": ("video", "url", *_LIMITS),
}
_LABELS = ("uuid", "cache_control")  # of a part: what it is called; hints about caching, which happens by itself here
_OTHER_APIS = {"input_text": "text", "input_image": "image_url", "output_text": "text"}  # what a part is called there
_RIGHT_FORM = {
    "text": {"type": "text", "text": "What is this?"},
    "image_url": {"type": "image_url", "image_url": {"url": "https://... or data:image/png;base64,..."}},
    "image": {"type": "image", "image": "https://... or data:image/png;base64,..."},
    "video_url": {"type": "video_url", "video_url": {"url": "https://... or data:video/mp4;base64,..."}},
    "video": {"type": "video", "video": "https://... or a list of pictures"},
}


ReadSource: TypeAlias = Callable[[Any, str, str], Any]  # (value, place, kind of part) -> MediaPart.source


def read_messages(messages: Sequence[Any], *, in_process: bool = False) -> tuple[Message, ...]:
    """Raises `InvalidRequest` with the place of the first mistake.

    From the network pictures are addresses (str). `in_process` also takes what a program holds (`MediaPart.source`).
    """
    if not messages:
        raise InvalidRequest("'messages' must not be empty", param="messages")
    if not in_process:
        _check_number(messages)
    read_source = _anything if in_process else _text
    return tuple(_read_message(message, f"messages[{i}]", read_source) for i, message in enumerate(messages))


def _check_number(messages: Sequence[Any]) -> None:
    number = len(messages)
    if number <= MAX_PARTS:
        contents = (message.get("content") for message in messages if isinstance(message, Mapping))
        number += sum(len(content) for content in contents if isinstance(content, list))
    if number > MAX_PARTS:
        raise InvalidRequest(
            f"'messages' holds {number} messages and parts; this server takes at most {MAX_PARTS}", param="messages"
        )


def _read_message(message: Any, place: str, read_source: ReadSource) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"'{place}' must be an object with 'role' and 'content'", param=place)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(f"'{place}.role' must be one of {', '.join(_ROLES)}", param=f"{place}.role")
    for name, value in message.items():
        if name not in ("role", "content") and value is not None:
            _check_message_field(name, value, role, place)
    return Message(_ROLES[role], _read_content(message.get("content"), role, f"{place}.content", read_source))


def _check_message_field(name: str, value: Any, role: str, place: str) -> None:
    """Labels are accepted, and what says nothing. No template of this family has a place for the name of who speaks."""
    if name == "name":
        _text(value, f"{place}.name")
    elif name not in _EMPTY_MESSAGE_FIELDS:
        hint = suggest(str(name), ("role", "content"))
        raise InvalidRequest(f"unknown field '{_short(name)}' in '{place}'{hint}", param=place)
    elif not (_says_nothing(value) or (name == "tool_call_id" and role == "tool")):
        raise InvalidRequest(f"'{place}.{name}' is not supported by this version", param=f"{place}.{name}")


def _says_nothing(value: Any) -> bool:
    """Also a mapping of nulls, as litellm makes them of the fields of an answer."""
    return all(inner is None for inner in value.values()) if isinstance(value, Mapping) else not value


def _read_content(content: Any, role: str, place: str, read_source: ReadSource) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (TextPart(_text(content, place)),)
    if isinstance(content, list):
        return tuple(_read_part(part, f"{place}[{i}]", read_source) for i, part in enumerate(content))
    if content is None and role == "assistant":
        return ()
    raise InvalidRequest(f"'{place}' must be a string or a list of parts", param=place)


def _read_part(part: Any, place: str, read_source: ReadSource) -> Part:
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"'{place}' must be an object such as {_form('text')}", param=place)
    kind = part.get("type")
    if kind is None:  # Qwen's own examples sometimes leave the type out
        kind = next((name for name in _FIELDS_OF_PART if name in part), None)
    if not isinstance(kind, str) or kind not in _FIELDS_OF_PART:
        known = ", ".join(_FIELDS_OF_PART)
        hint = suggest(_OTHER_APIS.get(kind, kind), _FIELDS_OF_PART) if isinstance(kind, str) else ""
        raise InvalidRequest(f"'{place}.type' must be one of {known}{hint}", param=f"{place}.type")
    _refuse_unknown(part, ("type", *_FIELDS_OF_PART[kind], *_LABELS), place)
    if kind == "text":
        return TextPart(_text(part.get("text"), f"{place}.text", kind))
    if kind == "image_url" or kind == "video_url":
        return _read_url_part(part, kind, place, read_source)
    return _read_qwen_part(part, "image" if kind == "image" else "video", place, read_source)


def _read_url_part(part: Mapping[str, Any], kind: str, place: str, read_source: ReadSource) -> MediaPart:
    """`{"type": "image_url", "image_url": {"url": ...}}`; limits may stand inside or beside."""
    inner = part.get(kind)
    here = f"{place}.{kind}"
    if not isinstance(inner, Mapping):
        raise InvalidRequest(f"'{here}' must be an object with 'url': {_form(kind)}", param=here)
    _refuse_unknown(inner, ("url", *_FIELDS_OF_PART[kind][1:]), here)
    media: MediaKind = "image" if kind == "image_url" else "video"
    fields = {**part, **{name: value for name, value in inner.items() if value is not None}}
    return MediaPart(media, read_source(inner.get("url"), f"{here}.url", kind), _part_limits(fields, place))


def _read_qwen_part(part: Mapping[str, Any], kind: MediaKind, place: str, read_source: ReadSource) -> MediaPart:
    """`{"type": "image", "image": ...}`; the source of a video may be a list of its frames."""
    source = part[kind] if kind in part else part.get("url")
    here = f"{place}.{kind}"
    if kind == "video" and isinstance(source, list | tuple):
        if not 1 <= len(source) <= MAX_FRAMES:
            raise InvalidRequest(f"'{here}' must hold 1 to {MAX_FRAMES} frames", param=here)
        frames = tuple(read_source(frame, f"{here}[{i}]", "image") for i, frame in enumerate(source))
        return MediaPart("video", frames, _part_limits(part, place))
    return MediaPart(kind, read_source(source, here, kind), _part_limits(part, place))


def _part_limits(fields: Mapping[str, Any], place: str) -> PixelLimits:
    """The limits of one part with its `detail`: "low" caps the area, "high" and "auto" keep the server's own limits."""
    limits = read_limits({name: fields[name] for name in _LIMITS if name in fields}, place)
    detail = fields.get("detail")
    if detail not in (None, "auto", "low", "high"):
        raise InvalidRequest(f"'{place}.detail' must be auto, low or high", param=f"{place}.detail")
    if detail != "low" or limits.max_pixels is not None:
        return limits
    return dataclasses.replace(limits, max_pixels=max(LOW_DETAIL_PIXELS, limits.min_pixels or 0))


def read_limits(fields: Mapping[str, Any], place: str) -> PixelLimits:
    """The fields of `PixelLimits` (`num_frames` also as `nframes`), and the `size` of transformers' processor, which is
    {"shortest_edge", "longest_edge"}. Raises `InvalidRequest`."""
    fields = _with_areas(fields, place)
    _refuse_unknown(fields, _LIMITS, place)
    low, high = (_integer(fields.get(name), f"{place}.{name}", 2**31 - 1) for name in ("min_pixels", "max_pixels"))
    if low is not None and high is not None and low > high:
        raise InvalidRequest(f"'{place}.min_pixels' is above max_pixels", param=f"{place}.min_pixels")
    name = "nframes" if fields.get("num_frames") is None else "num_frames"
    num_frames = _integer(fields.get(name), f"{place}.{name}", MAX_FRAMES)
    fps = fields.get("fps")
    if fps is not None and not (_is_number(fps) and 0 < fps <= 1000):
        raise InvalidRequest(f"'{place}.fps' must be a number above 0 and at most 1000", param=f"{place}.fps")
    if fps is not None and num_frames is not None:
        raise InvalidRequest(f"'{place}' must give either fps or {name}, not both", param=f"{place}.{name}")
    height, width = (_integer(fields.get(name), f"{place}.{name}", MAX_SIDE) for name in _PICTURE_LIMITS[2:])
    if (height is None) != (width is None):
        raise InvalidRequest(f"'{place}' must give resized_height and resized_width together", param=place)
    return PixelLimits(
        min_pixels=low,
        max_pixels=high,
        fps=None if fps is None else float(fps),
        num_frames=num_frames,
        total_pixels=_integer(fields.get("total_pixels"), f"{place}.total_pixels", 2**31 - 1),
        resized_height=height,
        resized_width=width,
    )


def _with_areas(fields: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """`fields` with the areas of `size` as `min_pixels` and `max_pixels`, which come first where both are given."""
    size = fields.get("size")
    if size is None:
        return fields
    here = f"{place}.size"
    if not isinstance(size, Mapping):
        raise InvalidRequest(f"'{here}' must be an object with {' and '.join(_EDGES)}", param=here)
    _refuse_unknown(size, tuple(_EDGES), here)
    areas = {_EDGES[edge]: _integer(area, f"{here}.{edge}", 2**31 - 1) for edge, area in size.items() if edge in _EDGES}
    return {**areas, **{name: value for name, value in fields.items() if name != "size" and value is not None}}


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _integer(value: Any, place: str, high: int) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= high:
        raise InvalidRequest(f"'{place}' must be an integer from 1 to {high}", param=place)
    return value


def _text(value: Any, place: str, form: str = "") -> str:
    if not isinstance(value, str):
        hint = f": {_form(form)}" if form else ""
        raise InvalidRequest(f"'{place}' must be a string{hint}", param=place)
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidRequest(f"'{place}' holds lone surrogates, which are no text", param=place)
    return value


def _anything(value: Any, place: str, form: str) -> Any:
    if value is None:
        raise InvalidRequest(f"'{place}' is missing", param=place)
    return value


def _refuse_unknown(fields: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for name, value in fields.items():
        if name not in known and value is not None:
            hint = suggest(str(name), known)
            raise InvalidRequest(f"'{_short(name)}' is not supported in '{place}'{hint}", param=place)


def _form(kind: str) -> str:
    return json.dumps(_RIGHT_FORM[kind])


def _short(name: object) -> str:
    return str(name)[:80]
