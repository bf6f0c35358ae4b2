"""One line in, one line out: OpenAI's batch lines (or plain bodies) become requests, answers become output lines.

Knows the shapes of batch lines. Bodies stay what they are; only what the command line adds is put into them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from qvl import wire
from qvl.batch.ask import Reply, read_answer
from qvl.errors import InvalidRequest, QvlError
from qvl.types import MediaKind

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
URLS = (CHAT, COMPLETIONS)
ID_PREFIX = b'{"id":"batch_req_'
ANSWERED = b'"error":null}'  # how every line ends whose request was answered, and no other

_MEDIA_FIELDS: Mapping[str, tuple[tuple[str, ...], MediaKind]] = {
    "image_url": (("image_url",), "image"),
    "image": (("image", "url"), "image"),
    "video_url": (("video_url",), "video"),
    "video": (("video", "url"), "video"),
}

Localise = Callable[[str, MediaKind], str]  # an address in a body -> the address to send


class Envelope(msgspec.Struct):
    """What has to be known of a line before its turn comes; the rest is only checked to be JSON."""

    custom_id: str | None = None


@dataclass(frozen=True, slots=True)
class Defaults:
    """What is put into bodies: `model` in place of theirs, `fields` where they are silent."""

    model: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """One request, ready to be sent."""

    url: str
    body: bytes


def shown_id(custom_id: str | None, number: int) -> str:
    """The `custom_id` of an output line: lines without one go by their number."""
    return f"line-{number}" if custom_id is None else custom_id


def read_id(data: bytes) -> str | None:
    """The `custom_id` of a line. Raises `msgspec.DecodeError` or `UnicodeDecodeError` for what is not a request."""
    return _read_envelope(data).custom_id


_read_envelope = msgspec.json.Decoder(Envelope).decode


def read_request(data: bytes, defaults: Defaults, localise: Localise | None) -> Request:
    """The request of one line. Raises `InvalidRequest`."""
    line = wire.read_json(data, "this line")
    if not isinstance(line, dict):
        raise InvalidRequest("a line must be a JSON object: a batch line, or the body of a request")
    if not isinstance(line.get("custom_id", ""), str):
        raise InvalidRequest("'custom_id' must be a string", param="custom_id")
    line.pop("custom_id", None)
    url, body = _open_envelope(line) if "body" in line else (CHAT if "messages" in line else COMPLETIONS, line)
    if "messages" not in body and "prompt" not in body:
        raise InvalidRequest("the body has neither 'messages' nor 'prompt'", param="messages")
    if body.get("stream"):
        raise InvalidRequest("'stream' has no meaning in a batch", param="stream")
    for name, value in defaults.fields.items():
        body.setdefault(name, value)
    if defaults.model is not None:
        body["model"] = defaults.model
    if localise is not None:
        _localise(body.get("messages"), localise)
    return Request(url, msgspec.json.encode(body))


def _open_envelope(line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if line.get("method", "POST") != "POST":
        raise InvalidRequest("'method' must be POST", param="method")
    body, url = line["body"], line.get("url", CHAT)
    if url not in URLS:
        raise InvalidRequest(f"'url' must be {' or '.join(URLS)}", param="url")
    if not isinstance(body, dict):
        raise InvalidRequest("'body' must be a JSON object", param="body")
    return url, body


def _localise(messages: Any, localise: Localise) -> None:
    """Every address of a picture or video through `localise`. Odd shapes are the server's to refuse."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                _localise_part(part, localise)


def _localise_part(part: dict[str, Any], localise: Localise) -> None:
    names, kind = _MEDIA_FIELDS.get(str(part.get("type")), ((), "image"))
    for name in names:
        if name in part:
            part[name] = _localised(part[name], kind, localise)


def _localised(value: Any, kind: MediaKind, localise: Localise) -> Any:
    if isinstance(value, str):
        return localise(value, kind)
    if isinstance(value, dict) and isinstance(value.get("url"), str):
        return {**value, "url": localise(value["url"], kind)}
    if isinstance(value, list):  # the frames of a video
        return [_localised(frame, "image", localise) for frame in value]
    return value


def answer_line(mark: bytes, custom_id: str, reply: Reply) -> bytes:
    """The output line of an answer, or of a server's refusal (then `error` says it too). `mark`: 32 hex digits."""
    answered = read_answer(reply.body)
    told = None if 200 <= reply.status < 300 else reply.error()
    response = {
        "status_code": reply.status,
        "request_id": reply.request_id or (answered.id if answered is not None else None) or "",
        "body": _one_line(reply.body) if answered is not None or told is None else wire.error_body(told),
    }
    error = None if told is None else {"code": reply.code(), "message": told.message}
    return _line(mark, custom_id, response, error)


def error_line(mark: bytes, custom_id: str, error: QvlError) -> bytes:
    """The output line of a request that no server has answered."""
    return _line(mark, custom_id, None, {"code": error.code or "error", "message": error.message})


def _one_line(body: bytes) -> msgspec.Raw:
    """JSON as it came, unless it has line ends between its parts."""
    return msgspec.Raw(msgspec.json.format(body, indent=-1) if b"\n" in body or b"\r" in body else body)


def _line(mark: bytes, custom_id: str, response: Any, error: Any) -> bytes:
    rest = msgspec.json.encode({"custom_id": custom_id, "response": response, "error": error})
    return ID_PREFIX + mark + b'",' + rest[1:]


def mark_of(line: bytes | bytearray) -> bytes | None:
    """The 32 hex digits by which an output line knows its request; None when we have not written it."""
    start, end = len(ID_PREFIX), len(ID_PREFIX) + 32
    return bytes(line[start:end]) if line.startswith(ID_PREFIX) and line[end : end + 2] == b'",' else None
